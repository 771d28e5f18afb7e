"""`pluglm plugins`: what it prints, how it ends, and that it imports no plugin and no torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from pluglm.cli.main import cli
from pluglm.kinds import KINDS

ATTENTION_API = KINDS["attention"].version

PYPROJECT = """
[project]
name = "acme-x"
[project.entry-points."pluglm.attention"]
x = "acme_x"
y = "acme_x"
[tool.pluglm]
providers = [{ kind = "attention", name = "x", summary = "S", api = ">=1.0,<2" }]
"""


@pytest.fixture
def furnished(site):
    """One plugin of each state."""
    site.install()
    site.install("acme-old", points={"attention/old": "acme_old"}, providers=[{"name": "old", "api": "<1"}])
    site.install("acme-bare", points={"cache/bare": "acme_bare"}, providers=None)
    site.install(
        "acme-plain",
        points={"attention/plain": "acme_plain"},
        providers=[
            {"name": "plain", "tier": "reference", "requires": {"devices": ["cuda"], "packages": ["absent>=2"]}}
        ],
    )
    return site


def lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


@pytest.mark.parametrize(
    "arguments",
    [("list",), ("info", "fa3"), ("why", "attention"), ("doctor",), ("disable", "acme-fa3"), ("enable", "acme-fa3")],
)
def test_no_command_imports_a_plugin_or_torch(site, arguments):
    site.install()
    program = (
        "import sys; from pluglm.cli.main import main\n"
        f"try: main(['plugins', *{arguments!r}])\n"
        "except SystemExit as end: code = end.code\n"
        "bad = [name for name in sys.modules if name.startswith('acme') or name in ('torch', 'pluggy', 'rich')]\n"
        "assert not bad, bad\n"
    )
    run = site.python("-c", program)
    assert run.returncode == 0, run.stderr


def test_help_imports_no_command(site):
    program = (
        "import sys; from pluglm.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "names = ['generate', 'chat', 'explain', 'plugins']\n"
        "assert not {f'pluglm.cli.{name}' for name in names} & set(sys.modules)"
    )
    run = site.python("-c", program)
    assert run.returncode == 0, run.stderr
    for name in ("generate", "chat", "explain", "plugins"):
        assert f"\n  {name} " in run.stdout


def test_the_list_tells_every_state(furnished):
    furnished.run("plugins", "disable", "fa3")
    rows = json.loads(furnished.run("plugins", "list", "--json").stdout)["plugins"]
    assert {row["id"]: (row["state"], row["tier"]) for row in rows} == {
        "acme-bare:cache/bare": ("no facts", ""),
        "acme-fa3:attention/fa3": ("disabled", "tuned"),
        "acme-old:attention/old": ("incompatible API", "tuned"),
        "acme-plain:attention/plain": ("enabled", "reference"),
    }


def test_the_list_is_a_plain_table_where_there_is_no_terminal(furnished):
    run = furnished.run("plugins", "list", "--kind", "attention")
    assert lines(run.stdout)[0] == ["id", "version", "kind", "tier", "state", "summary"]
    assert ["acme-fa3:attention/fa3", "1.0", "attention", "tuned", "enabled", "Fast."] in lines(run.stdout)
    assert "acme-bare" not in run.stdout
    assert "\x1b" not in run.stdout


def test_a_broken_plugin_is_one_line_and_the_rest_is_listed(furnished):
    (furnished.install("broken") / "METADATA").unlink()
    run = furnished.run("plugins", "list")
    assert run.returncode == 0
    assert "acme-fa3:attention/fa3" in run.stdout
    (problem,) = [line for line in run.stderr.splitlines() if "broken" in line]
    assert "METADATA cannot be read: No such file or directory." in problem


def test_a_summary_cannot_steer_the_terminal(site):
    site.install(providers=[{"summary": "a\x1b[31mb\nc"}])
    assert "a [31mb c" in site.run("plugins", "list").stdout


def test_looking_works_while_the_state_is_unreadable_and_says_so(site):
    site.install()
    site.config.mkdir()
    (site.config / "plugins.json").write_text("{")
    run = site.run("plugins", "list", "--json")
    assert [row["state"] for row in json.loads(run.stdout)["plugins"]] == ["unknown"]
    assert "the list of disabled plugins" in run.stderr
    assert "cannot be read" in site.run("plugins", "doctor").stdout
    assert site.run("plugins", "disable", "fa3").returncode == 1


def test_info_shows_what_is_known(furnished):
    run = furnished.run("plugins", "info", "acme-plain:attention/plain")
    assert run.returncode == 0
    assert "id:           acme-plain:attention/plain" in run.stdout
    assert '"packages": ["absent>=2"]' in run.stdout
    (entry,) = json.loads(furnished.run("plugins", "info", "bare", "--json").stdout)
    assert entry["manifest"] == "none"


def test_info_of_an_unknown_name_is_an_error_with_a_suggestion(site):
    site.install()
    run = site.run("plugins", "info", "fa33")
    assert run.returncode == 1
    assert run.stderr.startswith("PluginNotFoundError: no installed plugin or distribution is called 'fa33'.")
    assert "near names: fa3" in run.stderr
    assert "Traceback" not in run.stderr


def test_debug_shows_the_traceback(site):
    run = site.run("--debug", "plugins", "info", "fa33")
    assert run.returncode == 1
    assert "Traceback" in run.stderr


def test_why_gives_the_order_and_every_reason(furnished):
    furnished.run("plugins", "disable", "acme-old")
    run = furnished.run("plugins", "why", "attention", "--device", "cpu", "--json")
    rows = {row["id"]: row for row in json.loads(run.stdout)}
    assert rows["acme-fa3:attention/fa3"]["order"] == 1
    assert rows["acme-plain:attention/plain"]["refusals"] == [
        "needs device cuda, have cpu",
        "needs absent>=2, have none",
    ]
    assert rows["acme-old:attention/old"]["refusals"] == ["disabled by the user", f"needs API <1, have {ATTENTION_API}"]
    assert rows["acme-old:attention/old"]["order"] is None
    table = furnished.run("plugins", "why", "cache").stdout
    assert "states no facts: works when named, never chosen by auto" in table


def test_why_shows_a_manifest_that_is_not_valid(site):
    site.install(providers=[{"tier": "best"}])
    assert (
        "its manifest is not valid: tier: Input should be 'reference',"
        in site.run("plugins", "why", "attention").stdout
    )


def test_doctor_ends_well_if_there_are_only_warnings(site):
    site.install(providers=None)
    run = site.run("plugins", "doctor")
    assert run.returncode == 0, run.stdout
    assert "warning: acme-fa3:attention/fa3: its package has no pluglm.json; works when named" in run.stdout
    assert " 0 errors" in run.stdout


@pytest.mark.parametrize(
    ("install", "severity", "message"),
    [
        ({"providers": [{"tier": "best"}]}, "error", "pluglm.json is not a valid manifest."),
        ({"manifest": "{"}, "error", "pluglm.json is not JSON: "),
        ({"manifest": "[]"}, "error", "pluglm.json does not hold a JSON object."),
        ({"providers": [{"api": ">=9"}]}, "error", f"written for attention API >=9, this pluglm has {ATTENTION_API}."),
        ({"providers": [{}, {"name": "ghost"}]}, "error", "describes attention/ghost, which has no entry point."),
        ({"providers": []}, "warning", "does not describe it; works when named, never chosen by auto."),
        ({"requires": ["absent>=2"]}, "error", "needs absent>=2, have none. Install what it depends on."),
        (
            {"providers": [{"requires": {"packages": ["absent>=2"]}}]},
            "warning",
            "needs absent>=2, have none, so it cannot be used.",
        ),
        ({"version": "1.0"}, "error", "installed more than once (1.0 in "),
    ],
)
def test_doctor_finds(site, install, severity, message):
    site.install(**install)
    if install == {"version": "1.0"}:
        site.install(version="2.0")
    run = site.run("plugins", "doctor", "--json")
    found = [finding for finding in json.loads(run.stdout) if message in finding["message"]]
    assert [finding["severity"] for finding in found] == [severity]
    assert run.returncode == (severity == "error")


def test_doctor_warns_of_a_name_that_two_distributions_claim(site):
    site.install("a-one")
    site.install("b-two")
    run = site.run("plugins", "doctor")
    assert "attention/fa3: claimed by a-one:attention/fa3 and b-two:attention/fa3" in run.stdout
    assert run.returncode == 0


def test_enable_undoes_disable(site):
    site.install()
    assert site.run("plugins", "disable", "fa3").stdout == "Disabled acme-fa3:attention/fa3.\n"
    assert site.run("plugins", "enable", "fa3").stdout == "Enabled acme-fa3:attention/fa3.\n"
    assert json.loads((site.config / "plugins.json").read_text()) == {"schema": 1, "disabled": []}


def test_a_manifest_is_built_and_checked(site, tmp_path):
    package = tmp_path / "project" / "acme_x"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package.parent / "pyproject.toml").write_text(PYPROJECT)
    folder = str(package.parent)
    stale = site.run("plugins", "build-manifest", folder, "--check")
    assert stale.returncode == 1
    assert "is absent or out of date; run `pluglm plugins build-manifest" in stale.stderr
    built = site.run("plugins", "build-manifest", folder)
    assert built.stdout == f"Wrote {package / 'pluglm.json'}.\n"
    assert "warning: attention/y has no table in [[tool.pluglm.providers]]" in built.stderr
    assert site.run("plugins", "build-manifest", folder, "--check").returncode == 0


def test_the_reference_page_has_every_command_and_option():
    from pluglm.cli.plugins import command

    page = (Path(__file__).resolve().parents[2] / "docs" / "reference" / "plugins-command.md").read_text()
    headings = [line for line in page.splitlines() if line.startswith("## `")]
    for name, subcommand in command.commands.items():
        heading = next(line for line in headings if f"`{name}" in line)
        assert all(
            option in heading for parameter in subcommand.params for option in parameter.opts if option[0] == "-"
        )


def test_the_schema_is_printed(site):
    assert "providers" in json.loads(site.run("plugins", "schema").stdout)["properties"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plugin",), "No such command 'plugin'. Did you mean 'plugins'?"),
        (("xyz",), "No such command 'xyz'. There are: generate, chat, explain, measure, new, plugins."),
        (("plugins", "lst"), "No such command 'lst'."),
        (("plugins", "list", "--knd", "x"), "No such option"),
        (("plugins", "why", "atention"), "'atention' is not one of 'architecture', 'attention'"),
    ],
)
def test_a_mistake_in_the_arguments_ends_with_two_and_a_hint(site, arguments, message):
    run = site.run(*arguments)
    assert run.returncode == 2
    assert message in run.stderr


def test_a_package_that_provides_nothing_needs_no_manifest(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "acme-library"\nversion = "1.0"\n', "utf-8")
    result = CliRunner().invoke(cli, ["plugins", "build-manifest", "--check", str(tmp_path)])
    assert result.exit_code == 0
    assert "declares no pluglm provider" in result.output
