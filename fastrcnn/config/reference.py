"""The reference of all keys, from the schema: `python -m fastrcnn.config.reference > docs/config.md`."""

from dataclasses import fields

from fastrcnn.config.schema import Config, Leaf, Section, leaves, type_name

HEAD = """\
# Configuration keys

Written by `python -m fastrcnn.config.reference > docs/config.md` from `fastrcnn/config/schema.py`.

A configuration is the defaults below, then a YAML file, then `KEY VALUE` pairs from the command line:

```bash
fastrcnn train --config-file e2e_mask_rcnn_R_50_FPN_1x SOLVER.STEPS "(40000, 50000)"
```

- A file may start from another one, relative to itself, or from a recipe, by name: `_BASE_: quick_start.yaml`. It
  replaces what that one set, key by key.
- Tuples are written `(1, 2)`, `(1,)` or `[1, 2]`; an int stands for a float as well. Any other value of the wrong type
  is an error, and so is an unknown key.
- maskrcnn-benchmark's files load unchanged. Keys marked *dead* are accepted for their sake and do nothing; setting one
  gives a warning.
- `_TRAIN` and `_TEST` at the end of a name say when the key counts. Numbers of classes include the background, class 0.
- In Python, `cfg = load_config(file, pairs)` gives a tree of attributes: `cfg.MODEL.RPN.NMS_THRESH = 0.6`.
"""


def reference() -> str:
    """The whole page, in Markdown."""
    return HEAD + _section(Config(), "")


def _section(node: Section, path: str) -> str:
    prefix = f"{path}." if path else ""
    keys = [leaf for leaf in leaves(node, prefix) if "." not in leaf.path.removeprefix(prefix)]
    text = f"\n## {path or 'Top level'}\n\n{node.__doc__}\n\n"
    if keys:
        text += "| key | type | default | meaning |\n|---|---|---|---|\n" + "".join(map(_row, keys))
    below = [(f.name, getattr(node, f.name)) for f in fields(node)]
    return (
        text.rstrip("\n")
        + "\n"
        + "".join(_section(child, prefix + name) for name, child in below if isinstance(child, Section))
    )


def _row(leaf: Leaf) -> str:
    meaning = f"*dead*: {leaf.meaning}" if leaf.dead else leaf.meaning
    return f"| `{leaf.path}` | {type_name(leaf.type)} | `{leaf.default!r}` | {meaning} |\n"


if __name__ == "__main__":
    print(reference(), end="")
