-- Creates the roles of compose.yaml. A superuser runs this with psql in the log's database. The passwords come from psql's
-- environment.
\set ON_ERROR_STOP on
\getenv owner_password OWNER_PASSWORD
\getenv broker_password BROKER_PASSWORD

CREATE ROLE pgbackend_owner LOGIN PASSWORD :'owner_password';
CREATE ROLE pgbackend_broker LOGIN PASSWORD :'broker_password';

-- Migrating creates the log's schema. With pg_read_all_stats, `status` can show the age of a producer's transaction.
GRANT CREATE ON DATABASE :"DBNAME" TO pgbackend_owner;
GRANT pg_read_all_stats TO pgbackend_owner;
