-- The roles of compose.yaml. A superuser runs it in the log's database, with psql: the passwords come from its environment.
\set ON_ERROR_STOP on
\getenv owner_password OWNER_PASSWORD
\getenv broker_password BROKER_PASSWORD

CREATE ROLE pgbackend_owner LOGIN PASSWORD :'owner_password';
CREATE ROLE pgbackend_broker LOGIN PASSWORD :'broker_password';

-- Migrating makes the log's schema. `status` shows how long a producer's transaction is open if the owner may see it.
GRANT CREATE ON DATABASE :"DBNAME" TO pgbackend_owner;
GRANT pg_read_all_stats TO pgbackend_owner;
