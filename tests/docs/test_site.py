"""The site builds, and every link leads somewhere."""

import re
import subprocess
import sys
import tomllib
from urllib.parse import urlsplit

import pytest
import yaml
from docs.pages import page_names, read, words


@pytest.fixture(scope="module")
def site(tmp_path_factory, repository):
    """The built site; --strict makes every warning an error: pages, links and anchors that are not there."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_built_and_loads_nothing_from_elsewhere(site):
    for page in page_names()[1:]:
        html = (site / page.removeprefix("docs/").replace(".md", ".html")).read_text(encoding="utf-8")
        assert "<table>" in html or "|---" not in read(page), f"{page}: a table without an empty line before it"
        loaded = re.findall(r"<(?:script|img)[^>]* src=\"([^\"]+)\"|<link[^>]* href=\"([^\"]+)\"", html)
        assert not [address for pair in loaded for address in pair if urlsplit(address).netloc], page


def test_links_of_the_readme_lead_somewhere(site, repository):
    links = re.findall(r"\]\(([^)]+)\)", read("README.md"))
    for link in links:
        parts = urlsplit(link)
        if parts.scheme:
            continue
        assert (repository / parts.path).exists(), link
        if parts.fragment:
            html = (site / parts.path.removeprefix("docs/").replace(".md", ".html")).read_text(encoding="utf-8")
            assert f'id="{parts.fragment}"' in html, link
    assert len(links) > 10


@pytest.mark.parametrize("page", page_names())
def test_pictures_have_a_text_for_those_who_do_not_see_them(page):
    for text, address in re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", read(page)):
        assert len(text) > 5, f"{page}: {address}"
    assert "<img" not in read(page)


@pytest.mark.parametrize("page", page_names())
def test_files_of_the_repository_that_are_named_exist(page, repository):
    folders = ("fastrcnn", "triton_kernels", "tests", "docs", "tools", "benchmarks", "notebooks", "examples", ".ci")
    for word in words(page):
        if re.fullmatch(rf"({'|'.join(map(re.escape, folders))})/[\w./-]*", word):
            assert (repository / word).exists(), f"{page}: {word}"


def test_navigation_has_every_page_once(repository):
    def pages(node):
        return [node] if isinstance(node, str) else [page for entry in node for page in pages(*entry.values())]

    named = pages(yaml.safe_load((repository / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(f"docs/{page}" for page in named) == page_names()[1:]


def test_extras_and_versions_are_those_of_the_package(repository):
    package = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = read("docs/install.md")
    told = dict(re.findall(r"^\| `(\w+)` \| .* \| ([\w, -]+) \|$", page, re.M))
    wanted = {name: ", ".join(packages) for name, packages in package["optional-dependencies"].items()}
    assert told == {name: packages for name, packages in wanted.items() if name != "dev"}
    assert "| `dev` |" in page
    least = dict(re.findall(r"(torch|torchvision)>=([\d.]+)", " ".join(package["dependencies"])))
    assert f"| PyTorch, torchvision | {least['torch']}, {least['torchvision']} and newer |" in page
    assert f"Python {package['requires-python'].removeprefix('>=')} or newer" in page


def test_citation(repository):
    from fastrcnn import __version__

    citation = yaml.safe_load((repository / "CITATION.cff").read_text(encoding="utf-8"))
    # the keys that the schema 1.2.0 asks for, and those that must agree with the package
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == __version__
    assert citation["license"] == "MIT"
