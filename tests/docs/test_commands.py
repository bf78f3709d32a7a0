"""Commands, keys and names in the documentation exist."""

import argparse
import importlib
import re
import shlex

import pytest
import yaml
from docs.pages import Block, blocks, page_names, words

from fastrcnn import cli
from fastrcnn.config import Config, find_config, load_config
from fastrcnn.config.schema import leaves

SECTIONS = "MODEL|INPUT|DATASETS|DATALOADER|SOLVER|TEST"
KEY = re.compile(rf"(?:(?:{SECTIONS})\.[A-Z][\w.]*|DTYPE|SEED|OUTPUT_DIR|PATHS_CATALOG)")
KEYS = {leaf.path for leaf in leaves(Config())}
SECTIONS_OF_KEYS = {".".join(key.split(".")[:n]) for key in KEYS for n in range(1, key.count(".") + 1)}


def commands(block: Block) -> list[list[str]]:
    """The words of each command of ours in a block: `fastrcnn …`, `python tools/….py …`, `torchrun …` of either."""
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        for part in re.split(r" && | \| ", line):
            tokens = [t for t in shlex.split(part, comments=True) if not re.fullmatch(r"[A-Z_]+=\S*", t)]
            if tokens and tokens[0] == "torchrun":
                tokens = [t for t in tokens[1:] if not t.startswith("--n") and not t.startswith("--rdzv")]
                assert tokens[0] != "-m" or tokens[1] == "fastrcnn", f"{block}: {part}"
                tokens = tokens[1:] if tokens[0] == "-m" else ["python", *tokens]
            if tokens[:1] == ["python"] and tokens[1].startswith("tools/"):
                name = tokens[1].rsplit("/", 1)[1].removesuffix(".py").replace("_", "-")
                found.append(["fastrcnn", OLD_TOOLS.get(name, name), *tokens[2:]])
            elif tokens[:1] == ["fastrcnn"] and tokens[1] != "--version":
                found.append(tokens)
    return found


OLD_TOOLS = {"convert-cityscapes-to-coco": "convert-cityscapes"}
COMMANDS = [(block, command) for block in blocks("bash") for command in commands(block)]
FILES = {block.mark.removeprefix("file: ") for block in blocks("yaml")}


def parse(command: list[str]) -> argparse.Namespace:
    name, *rest = command[1:]
    parser = argparse.ArgumentParser()
    cli.command(name).add_arguments(parser)
    return parser.parse_intermixed_args(rest)


@pytest.mark.parametrize(("block", "command"), COMMANDS, ids=[str(block) for block, _ in COMMANDS])
def test_command_is_understood(block, command, capsys):
    try:
        args = parse(command)
    except SystemExit:
        pytest.fail(f"{block}: {' '.join(command)}: {capsys.readouterr().err}")
    config = getattr(args, "config_file", None)
    opts = getattr(args, "opts", None) or []
    if hasattr(args, "inputs"):  # images and then pairs
        _, opts = cli.command(command[1]).split_arguments([*args.inputs, *opts])
    if config is not None and config not in FILES and not config.startswith("output/"):
        assert find_config(config), block
    else:
        config = None
    load_config(config, opts)


@pytest.mark.parametrize("page", page_names())
def test_commands_within_the_text_are_understood(page, capsys):
    """`fastrcnn train` names one; what has more words is parsed."""
    for word in words(page):
        for command in commands(Block(page, 0, "bash", word, "")) if re.match(r"(fastrcnn|torchrun) ", word) else ():
            assert command[1] in cli.COMMANDS, f"{page}: {word}"
            try:
                parse(command) if len(command) > 2 else None
            except SystemExit:
                pytest.fail(f"{page}: {word}: {capsys.readouterr().err}")


def test_there_are_commands_of_every_kind():
    assert {command[1] for _, command in COMMANDS} >= set(cli.COMMANDS) - {"completion", "convert-cityscapes"}


@pytest.mark.parametrize("page", page_names())
def test_keys_exist(page):
    """`KEY`, `SECTION` and `KEY VALUE`; what stands in columns of other projects is theirs."""
    for word in words(page):
        if not KEY.match(word) or KEY.match(word).end() < len(word.split()[0]):
            continue
        key, *value = word.split(maxsplit=1)
        assert key in KEYS | SECTIONS_OF_KEYS, f"{page}: {word}"
        if value and key in KEYS:
            tokens = shlex.split(word)
            load_config(None, tokens if len(tokens) % 2 == 0 else [key, value[0]])


def test_recipes_in_yaml_have_known_keys(tmp_path):
    checked = 0
    for block in blocks("yaml"):
        tree = yaml.safe_load(block.text)
        if isinstance(tree, dict) and set(tree) & {*SECTIONS.split("|"), "_BASE_"}:
            path = tmp_path / "recipe.yaml"
            if "_BASE_" in tree:
                tree["_BASE_"] = str(find_config(tree["_BASE_"]))
            path.write_text(yaml.safe_dump(tree))
            load_config(path)
            checked += 1
    assert checked >= 3


NAME = re.compile(r"(?:fastrcnn|triton_kernels)(?!\.json)(?:\.\w+)+")  # an export holds a file fastrcnn.json


@pytest.mark.parametrize("page", page_names())
def test_names_can_be_imported(page):
    for word in words(page):
        match = NAME.match(word)
        if match and re.fullmatch(r"(\(.*\))?", word[match.end() :]):
            assert resolve(match[0]) is not None, f"{page}: {word}"


def resolve(name: str):
    """The module, class, function or method of that dotted name."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)
