"""Every command, key, request, YAML block and link of the READMEs exists and parses; none is run."""

from __future__ import annotations

import pytest
import typer

from raylm.cli import app
from raylm.config import STAGES
from tests.readme_commands import ROOT
from tests.readmes import blocks, commands, mentions, mistakes

# README -> the fewest commands and mentions of commands that it is expected to have.
READMES = {
    "README.md": (8, 15),
    "jobs/README.md": (35, 5),
    "cluster/README.md": (4, 2),
    "raylm/README.md": (0, 1),
    "tests/benchmarks/README.md": (18, 10),
    "tests/fuzz/README.md": (4, 0),
}


@pytest.mark.parametrize("name", READMES)
def test_what_a_readme_names_exists(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    least_commands, least_mentions = READMES[name]
    assert len(commands(text)) >= least_commands
    assert len(mentions(text)) >= least_mentions
    assert mistakes(text, (ROOT / name).parent) == []


def test_no_readme_is_left_out() -> None:
    folders = ("jobs", "cluster", "raylm", "tests")
    found = {ROOT / "README.md", *(path for folder in folders for path in (ROOT / folder).rglob("README.md"))}
    assert {str(path.relative_to(ROOT)) for path in found} == set(READMES)
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_every_benchmark_is_described() -> None:
    text = (ROOT / "tests" / "benchmarks" / "README.md").read_text(encoding="utf-8")
    scripts = {path.name for path in (ROOT / "tests" / "benchmarks").glob("*.py")}
    assert {name for name in scripts if f"({name})" not in text} == set()


def test_every_room_is_on_the_map() -> None:
    text = (ROOT / "raylm" / "README.md").read_text(encoding="utf-8").partition("## How a command runs")[0]
    rooms = {f"{path.name}/" for path in (ROOT / "raylm").iterdir() if (path / "__init__.py").is_file()}
    files = {path.name for path in (ROOT / "raylm").glob("*.py")} - {"__init__.py"}
    assert {name for name in rooms | files if f"[{name}]" not in text and f"`{name}`" not in text} == set()


@pytest.mark.parametrize("stage", STAGES)
def test_help_of_a_stage_says_what_it_reads_writes_and_an_example(stage: str) -> None:
    command = typer.main.get_command(app).commands[stage]
    text = command.help
    assert "Reads " in text
    assert "Writes " in text
    example = text.partition("Example:\n")[2].strip()
    assert example.startswith(f"raylm {stage} ")
    assert mistakes(bash(example), ROOT) == []


def bash(line: str) -> str:
    return f"```bash\n{line}\n```\n"


RECIPES = "jobs/recipes"
WRONG = {
    "stage": (bash(f"raylm pretrian {RECIPES}/quickstart/pretrain.yaml"), "No such command 'pretrian'"),
    "option": (bash("raylm quickstart --server"), "No such option"),
    "no file": (bash(f"raylm pretrain {RECIPES}/nothing.yaml"), "no such file"),
    "no argument": (bash("raylm pretrain"), "Missing argument"),
    "key": (bash(f"raylm pretrain {RECIPES}/quickstart/pretrain.yaml training.stebs=3"), "unknown key"),
    "value": (bash(f"raylm tune {RECIPES}/quickstart/tune.yaml tuning.trials=many"), "found 'many'"),
    "key with a placeholder": (bash("raylm evaluate FILE.yaml evaluation.strides=3"), "unknown key"),
    "schema": (bash("raylm schema pretraining"), "no such stage"),
    "second command": (bash("raylm schema serve; raylm schemas serve"), "No such command 'schemas'"),
    "job": (bash("ray job submit --working-dir . -- python jobs/training.py FILE.yaml"), "no such file"),
    "job's option": (bash("ray job submit --working-directory . -- python jobs/tune.py FILE.yaml"), "unknown option"),
    "indented": ("text\n\n    raylm servee FILE.yaml\n", "No such command 'servee'"),
    "mention": ("Run `raylm prepares` first.\n", "No such command 'prepares'"),
    "script": (bash("bash tests/start.sh"), "no such file"),
    "marker": (bash('bash tests/run.sh -m "serving and not slwo"'), "no such marker: slwo"),
    "benchmark": (bash("python tests/benchmarks/serving_laod.py MODEL"), "no such file"),
    "benchmark's option": (bash("python tests/benchmarks/serving_load.py MODEL --client 8"), "unrecognized arguments"),
    "benchmark's choice": (bash("python tests/benchmarks/serving_soak.py crash MODEL OUT.json"), "invalid choice"),
    "benchmark's number": (bash("python tests/benchmarks/prepare_speed.py --rounds few"), "invalid int value"),
    "one argument too many": (bash("python tests/benchmarks/setup_memory.py A.json B.json"), "at most 1 arguments"),
    "no options at all": (bash("python tests/benchmarks/elastic.py --steps 400"), "no option --steps"),
    "extra": (bash("pip install 'raylm[gpus]'"), "no such extra: gpus"),
    "unknown program": (bash("rylm prepare FILE.yaml"), "unknown program"),
    "route": (bash("curl -s http://127.0.0.1:8000/v1/answers -d '{}'"), "no such route: POST /v1/answers"),
    "method": (bash("curl -s -X DELETE http://127.0.0.1:8000/v1/models"), "no such route: DELETE"),
    "body": (bash("""curl -s http://127.0.0.1:8000/v1/qa -d '{"query": "Who?"}'"""), "QuestionRequest"),
    "JSON": (bash("""curl -s http://127.0.0.1:8000/v1/qa -d '{"question": Who?}'"""), "not JSON"),
    "yaml without a stage": ("```yaml\ndata: {train: a.txt}\n```\n", "'# stage: STAGE'"),
    "yaml": ("```yaml\n# stage: prepare\nrun: {name: x}\ndata: {train: a.txt, trian: a.txt}\n```\n", "unknown key"),
    "key in the text": ("Set `training.learning_speed`.", "no such key: learning_speed"),
    "default": ("| `training.batch_size` | sequences in a step | 64 |\n", "default: found 64, allowed: 32"),
    "word as a default": ("| `tuning.scheduler` | asha or none | `none` |\n", "default: found none, allowed: asha"),
    "deep key in the text": ("Set `data.fields.labels`.", "no such key: labels"),
    "route in the text": ("`GET /v1/model`", "no such route"),
    "file in the text": ("See `raylm/parallel/engines.py`.", "no such file"),
    "link": ("[here](jobs/READ.md)", "no such file"),
    "picture": ("![page](jobs/images/none.png)", "no such file"),
    "heading": ("[here](jobs/README.md#preparation)", "no such heading"),
    "own heading": ("# Title\n\n[here](#tittle)", "no such heading"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_found(name: str) -> None:
    text, expected = WRONG[name]
    found = mistakes(text, ROOT)
    assert len(found) == 1
    assert expected in found[0]


def test_what_is_right_passes() -> None:
    text = "\n".join(
        [
            "# A title",
            bash(f"raylm plan {RECIPES}/quickstart/pretrain.yaml training.steps=30 # a remark"),
            bash("H='Content-Type: application/json'; U=http://127.0.0.1:8000/v1\ncurl -s $U/models/tiny"),
            "`raylm prepare` sets `tokenizer.mask_token=true` [above](#a-title), and `model.config.n_layer`.",
        ]
    )
    assert mistakes(text, ROOT) == []
    assert (len(commands(text)), len(mentions(text)), len(blocks(text))) == (3, 1, 2)
