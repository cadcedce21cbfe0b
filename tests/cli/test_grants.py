"""`pgbackend grants` prints SQL. tests/postgres/test_grants.py tests the rights that it gives."""

from tests.cli.conftest import Run


async def test_grants_prints_sql_without_a_database(run: Run) -> None:
    result = await run("grants", "--producer", "shop", "--producer", 'the "shop"', "--schema", "Ours")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[-1] == "COMMIT;"
    assert 'GRANT USAGE ON SCHEMA "Ours" TO "shop", "the ""shop""";' in lines
    assert not [line for line in lines if "subscriptions" in line], "a producer has nothing to do with them"


async def test_a_role_can_be_of_several_kinds(run: Run) -> None:
    result = await run("grants", "--producer", "broker", "--consumer", "broker", "--operator", "ops")
    assert 'GRANT USAGE ON SCHEMA "pgbackend" TO "broker", "ops";' in result.stdout.splitlines()
    assert '"broker", "broker"' not in result.stdout


async def test_the_schema_can_come_from_the_environment(run: Run) -> None:
    result = await run("grants", "--operator", "ops", env={"PGBACKEND_SCHEMA": "theirs"})
    assert 'ON SCHEMA "theirs" TO' in result.stdout


async def test_no_role_is_wrong_usage_and_public_is_refused(run: Run) -> None:
    assert (await run("grants")).exit_code == 2
    result = await run("grants", "--consumer", "public")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: 'public' is not a role. Name the roles that produce, consume, read or operate.\n"
