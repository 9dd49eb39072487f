"""The `yuanzhen` command: a thin table of sub-commands. Each imports what it needs only when it is called."""

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="yuanzhen",
    help="Yuanzhen 远诊: studies up from the county, signed reports back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def up(
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay, and stop everything on Ctrl-C.")] = False,
    demonstrate: Annotated[bool, typer.Option("--demo", help="Then run the demonstration.")] = False,
) -> None:
    """Start the whole system on this machine; data under ./var."""
    from deploy import assets, stack

    var = stack.var_directory()
    began = time.monotonic()

    def announce() -> None:
        typer.echo(f"up after {time.monotonic() - began:.1f} s\n{stack.summary(var)}")

    assets.setup(say=typer.echo)
    stack.up(var, announce, foreground=foreground)
    if demonstrate:
        demo(as_json=False)


@app.command()
def down() -> None:
    """Stop the system in order."""
    from deploy import stack

    typer.echo(stack.down(stack.var_directory()))


@app.command()
def status() -> None:
    """Show every process: its id, port, restarts, and whether it runs. Exit status 1 unless all do."""
    from deploy import stack

    if not stack.print_status(stack.var_directory()):
        raise typer.Exit(1)


@app.command()
def clean() -> None:
    """Forget everything under ./var; refused while the system runs."""
    from deploy import stack

    typer.echo(stack.clean(stack.var_directory()))


@app.command()
def setup() -> None:
    """Bring viewer, scripts, fonts and demonstration data into ./.cache."""
    from deploy import assets

    typer.echo(f"assets are in {assets.setup(say=typer.echo)}")


@app.command()
def demo(
    as_json: Annotated[bool, typer.Option("--json", help="Print facts for machines, nothing else.")] = False,
    chaos: Annotated[bool, typer.Option("--chaos", help="Kill processes at random meanwhile.")] = False,
) -> None:
    """Send real studies the whole way and show what happened. Exit status 1 if anything differs."""
    from deploy import demo as demonstration

    raise typer.Exit(demonstration.run(as_json=as_json, chaos=chaos))


rules = typer.Typer(help="Routing rules.", no_args_is_help=True)
app.add_typer(rules, name="rules")


@rules.command("test")
def rules_test(
    site: str,
    modality: list[str],
    priority: str = "routine",
    body_part: Annotated[list[str] | None, typer.Option()] = None,
    ae_title: str = "",
    description: Annotated[list[str] | None, typer.Option()] = None,
) -> None:
    """Show what the rules file does with a study of SITE and MODALITY."""
    from routing.rules_cli import try_rules
    from storage.settings import Settings
    from storage.vocabulary import Priority

    path = Path(os.environ.get("YUANZHEN_RULES_FILE") or Settings.model_fields["rules_file"].default)
    status = try_rules(
        path,
        site=site,
        modality=modality,
        priority=Priority(priority),
        body_part=body_part,
        ae_title=ae_title,
        description=description,
    )
    raise typer.Exit(status)


audit = typer.Typer(help="The audit trail.", no_args_is_help=True)
app.add_typer(audit, name="audit")


@audit.command("verify")
def audit_verify() -> None:
    """Hold every event against its neighbours and the signed daily heads. Exit status 1 if anything differs."""
    from deploy import stack
    from routing.heads import verify_heads
    from storage.database import Database
    from storage.objects import Objects
    from storage.receipts import load_public_key
    from storage.settings import settings as centre_settings

    if "YUANZHEN_DATABASE_URL" not in os.environ:  # no centre is named: the one on this machine
        os.environ.update(stack.read_state(stack.var_directory()).get("environment", {}))
    configuration = centre_settings()
    database = Database(configuration.database_url, pool_size=1)
    public_key = load_public_key((configuration.pki_dir / "receipt.pub").read_bytes())
    verdict = verify_heads(database, Objects(configuration), public_key)
    database.close()
    for fault in verdict.faults:
        typer.echo(f"◆ {fault}")
    counts = f"{verdict.events} events of {verdict.studies} studies, {verdict.days} signed days"
    typer.echo(f"{counts}: {len(verdict.faults)} faults" if verdict.faults else f"{counts}: all as signed")
    raise typer.Exit(1 if verdict.faults else 0)


@app.command()
def settings() -> None:
    """Print the table of settings (docs/settings.md)."""
    from deploy.settings_table import render

    typer.echo(render(), nl=False)


@app.command()
def migrate() -> None:
    """Bring the schema of YUANZHEN_DATABASE_OWNER_URL up to date."""
    from storage.database import upgrade

    upgrade(os.environ.get("YUANZHEN_DATABASE_OWNER_URL", ""))


@app.command()
def pki(directory: Path, hosts: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Make demonstration certificates in DIRECTORY for an ingest server reached as HOSTS."""
    from deploy.pki import ensure_pki

    typer.echo(f"certificates are in {ensure_pki(directory, hosts or ()).directory}")


def main() -> None:
    """Entry point: errors made on purpose become one message and exit status 1."""
    from deploy.process import StackError
    from storage.errors import YuanzhenError

    try:
        app()
    except (StackError, YuanzhenError) as error:
        typer.echo(f"yuanzhen: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
