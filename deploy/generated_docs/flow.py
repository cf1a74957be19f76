"""Generator of `docs/flow.md` and `docs/asyncapi.json` from the table of topics and the messages.

`python -m deploy.generated_docs.flow docs` writes them; with `--check` it only compares them.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bus import topics
from bus.topics import TABLE, Topic
from deploy.generated_docs.asyncapi import asyncapi_page

HEAD = """# The flow

<!-- Made by `make docs` from bus/topics.py. Do not edit. -->

Everything that happens in DeePar is a record on one of these topics. A *region* is a partition of the control topics: its
planner, its edges, its devices.

```mermaid
flowchart LR
"""


def flow_page() -> str:
    """The text of `flow.md`."""
    lines = [HEAD.rstrip("\n")]
    for index, topic in enumerate(TABLE):
        label = topic.name.replace("<", "#lt;").replace(">", "#gt;")
        lines.append(f'    t{index}[["{label}"]]')
        lines += [f"    {writer} --> t{index}" for writer in topic.writers]
        lines += [f"    t{index} --> {reader}" for reader in topic.readers if reader != "tools"]
    lines += ["```", "", "(`tools`, such as `deepar tail`, may read everything.)", ""]
    lines += [
        "| topic | encoding | messages | key | partition | written by | read by | keeps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(topic) for topic in TABLE]
    lines.append("")
    lines += [f"* `{topic.name}`: {topic.purpose}." for topic in TABLE]
    lines += [
        "",
        f"Cloud stages share `{topics.ACTIVATIONS_CLOUD}` as the consumer group `{topics.CLOUD_GROUP}`. Keys are hashed with",
        "murmur2, as every Kafka client does by default; where the partition is the region it is given explicitly.",
        "",
    ]
    return "\n".join(lines)


def _row(topic: Topic) -> str:
    if topic.compacted:
        keeps = "the last of each key"
    elif topic.retention_s < 0:
        keeps = "everything"
    else:
        hours = topic.retention_s / 3600
        keeps = f"{hours:g} h" if hours < 24 else f"{hours / 24:g} days"
    cells = (
        f"`{topic.name}`",
        topic.encoding.value,
        ", ".join(f"`{name}`" for name in topic.messages) or "-",
        topic.key,
        topic.partition_by.value,
        ", ".join(topic.writers),
        ", ".join(topic.readers),
        keeps,
    )
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str]) -> int:
    """Write the documents into a folder; with `--check`, return 1 if those in the folder are outdated."""
    check = "--check" in arguments
    folder = Path(next(argument for argument in arguments if not argument.startswith("--")))
    stale = 0
    for path, page in ((folder / "flow.md", flow_page()), (folder / "asyncapi.json", asyncapi_page())):
        if not check:
            path.write_text(page, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != page:
            print(f"{path} is outdated; run `make docs`", file=sys.stderr)
            stale += 1
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
