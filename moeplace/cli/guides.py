"""``moeplace help``: how to record, place and load with each serving stack."""

from __future__ import annotations

from importlib import resources
from typing import Any

import click

from moeplace.cli.options import common

EPILOG = """\b
Examples:
  moeplace help
  moeplace help sglang
  moeplace help trtllm --json
"""


def guides() -> dict[str, str]:
    """Topic → text, sorted."""
    folder = resources.files("moeplace") / "guides"
    found = {item.name.removesuffix(".txt"): item for item in folder.iterdir() if item.name.endswith(".txt")}
    return {name: found[name].read_text(encoding="utf-8") for name in sorted(found)}


@click.command("help", epilog=EPILOG)
@click.argument("topic", required=False)
@common
def help_command(topic: str | None, **options: Any) -> None:
    """Tell how to record a trace, place experts and load the result with a serving stack.

    Without a TOPIC the stacks are listed. Commands are explained by moeplace COMMAND --help.
    """
    from moeplace.errors import unknown_name
    from moeplace.report import write_json

    texts = guides()
    if topic is not None and topic not in texts:
        raise unknown_name("topic", topic, list(texts))
    chosen = texts if topic is None else {topic: texts[topic]}
    if options["as_json"]:
        write_json({"schema": "moeplace/help/1", "topics": [{"name": key, "text": chosen[key]} for key in chosen]})
        return
    if topic is None:
        width = max(map(len, texts))
        for name, text in texts.items():
            click.echo(f"{name:<{width}}  {text.splitlines()[0]}")
        return
    click.echo(texts[topic], nl=False)
