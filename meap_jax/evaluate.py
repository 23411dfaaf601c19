"""Evaluates a model, or compares two evaluations.

python -m meap_jax.evaluate --workdir=DIR [--tasks=niah,mdqa] [--out=FILE.json] [--config.eval.niah.trials=3 ...]
    [--step=N] [--split=test] [--mesh=data=-1]
python -m meap_jax.evaluate --hf=DIR --tasks=... --out=FILE.json
python -m meap_jax.evaluate compare A.json B.json [--out=DIR]

Tasks: validation, retrieval (both on the data of a run), facts, niah, ruler, mdqa, kv, mneedle, commonsense, summaries;
their options are the fields eval.* of a config. Prints every metric with its interval as JSON, and writes them with a
record for each example to FILE.json, by default DIR/evaluation_SPLIT.json. The predictions of tasks that ask a model
are written to the folder FILE/ while they are made, a file of JSON lines for each task; the same command goes on from
them.
"""

import argparse
import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from etils import epath

from meap_jax import cli
from meap_jax import config as config_lib
from meap_jax.data.prepared import Prepared
from meap_jax.errors import ConfigError
from meap_jax.evals import Setting, compare, make_evaluators
from meap_jax.hub import open_hub_model
from meap_jax.models import OpenModel, fingerprint, open_model
from meap_jax.paths import absolute
from meap_jax.run import check_data, open_data

KINDS = {bool: "true or false", int: "a whole number", float: "a number"}


def evaluate(
    workdir: epath.Path,
    split: str = "test",
    *,
    tasks: str | None = None,
    step: int | None = None,
    mesh: Mapping[str, int] | None = None,
    options: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Runs evaluators on a checkpoint of a run.

    Args:
      workdir: absolute, of the run.
      split: "validation" or "test".
      tasks: names of evaluators, "validation,retrieval"; default: `eval.tasks` of the run's config.
      step: of the checkpoint; default: the newest.
      mesh: sizes of its axes, in place of the config's.
      options: fields of the config that get other values, as text: {"eval.niah.trials": "3"}.
      folder: takes predictions, and holds those of an evaluation that was interrupted; None: there are none.

    Returns:
      See `evaluate_model`.

    Raises:
      ConfigError, DataError: if the model or its data cannot be read.
    """
    opened = open_model(workdir, step, mesh)
    config = opened.model.config

    def data() -> Prepared:
        if "imported" in opened.meta:
            raise ConfigError(
                f"{workdir} holds an imported model, which has no data to be evaluated on: evaluate a run that started "
                "from it (init_from)."
            )
        prepared = open_data(config, workdir)
        check_data(prepared, opened.meta, workdir)
        return prepared

    set_options(opened, options or {})
    setting = Setting.of_model(opened, split, data, folder, fingerprint(opened.params))
    return evaluate_model(opened, setting, config.eval.tasks if tasks is None else tasks)


def evaluate_hub_model(
    source: Path, tasks: str, *, mesh: Mapping[str, int], options: Mapping[str, str], folder: Path | None
) -> dict[str, Any]:
    """Runs evaluators on a folder of the Hugging Face hub; see `evaluate`."""
    opened = open_hub_model(source, mesh=mesh)

    def no_data() -> Prepared:
        raise ConfigError(f"--hf is {source}, a model without data: the tasks validation and retrieval need a run's.")

    set_options(opened, options)
    return evaluate_model(opened, Setting.of_model(opened, "test", no_data, folder, fingerprint(opened.params)), tasks)


def evaluate_model(opened: OpenModel, setting: Setting, tasks: str) -> dict[str, Any]:
    """Runs evaluators on a model.

    Returns:
      {"step": of the checkpoint, "metrics": {evaluator/metric: interval}, "examples": {evaluator: [records]}, "model":
      its fingerprint, "options": the fields eval.* that are not the default}.
    """
    config = setting.config
    evaluators = make_evaluators(setting, tasks)
    defaults = config_lib.flatten(config_lib.base().eval)
    changed = {name: value for name, value in config_lib.flatten(config.eval).items() if value != defaults[name]}
    report: dict[str, Any] = {
        "step": opened.step, "model": setting.fingerprint, "options": changed, "metrics": {}, "examples": {},
    }  # fmt: skip
    with jax.set_mesh(setting.model.mesh):
        for name, evaluator in evaluators.items():
            metrics, report["examples"][name] = evaluator.run(opened.params)
            report["metrics"] |= {f"{name}/{key}": interval._asdict() for key, interval in metrics.items()}
    return report


def set_options(opened: OpenModel, options: Mapping[str, str]) -> None:
    """Gives fields of a model's config other values, and checks them.

    Raises:
      ConfigError: one is no such field, or has a value that it can't have.
    """
    config = opened.model.config
    known = config_lib.flatten(config)
    for name, text in options.items():
        if name not in known or not name.startswith("eval."):
            near = difflib.get_close_matches(name, [field for field in known if field.startswith("eval.")], n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ConfigError(f"--config.{name} is not a field that an evaluation can set, those of eval.* are{hint}")
        config.update_from_flattened_dict({name: _parsed(name, text, type(known[name]))})
    config_lib.check(config, needs_data=False)


def _parsed(name: str, text: str, kind: type) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return text if kind is type(None) else kind(text)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"--config.{name} is {text!r}, but must be {KINDS[kind]}.") from error


def command(argv: list[str]) -> None:
    """Evaluates the model that the command line names, prints its metrics and writes its JSON and pictures."""
    if argv[1:2] == ["compare"]:
        _compare(argv[2:])
        return
    parser = argparse.ArgumentParser(
        prog="python -m meap_jax.evaluate", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--workdir", help="of a run that has saved a checkpoint, or of an imported model")
    parser.add_argument("--hf", help="a folder of the Hugging Face hub, in place of --workdir")
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--tasks", help="names of evaluators; default: eval.tasks of the run's config")
    parser.add_argument("--out", help="the JSON file; default: evaluation_SPLIT.json in the workdir")
    parser.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
    parser.add_argument("--mesh", default="", help="axis=size,...: in place of those axes of the config's mesh")
    args, rest = parser.parse_known_args(argv[1:])
    options = {}
    for word in rest:
        match = re.fullmatch(r"--config\.([\w.]+)=(.*)", word, re.DOTALL)
        if not match:
            raise ConfigError(f"{word!r} is not a flag: options of tasks are given as --config.eval.FIELD=VALUE.")
        options[match[1]] = match[2]
    if (args.workdir is None) == (args.hf is None):
        raise ConfigError("give one of --workdir, of a run or an imported model, and --hf, a folder of the hub.")
    if args.hf is not None and (args.out is None or args.tasks is None):
        raise ConfigError("--hf needs --tasks and --out, such as --tasks=niah --out=results.json.")
    mesh = cli.parse_mesh(args.mesh)
    workdir = absolute(epath.Path(args.workdir or args.hf))
    out = absolute(epath.Path(args.out)) if args.out else workdir / f"evaluation_{args.split}.json"
    if out.suffix != ".json":
        raise ConfigError(f"--out is {out}, but must be the name of a .json file.")
    folder = Path(out.with_suffix(""))
    if args.hf is not None:
        results = evaluate_hub_model(Path(workdir), args.tasks, mesh=mesh, options=options, folder=folder)
    else:
        kwargs: dict[str, Any] = dict(tasks=args.tasks, step=args.step, mesh=mesh, options=options, folder=folder)
        results = evaluate(workdir, args.split, **kwargs)
    if jax.process_index() == 0:
        from meap_jax.evals import plots  # Half a second of matplotlib, for which no evaluation should wait.

        out.parent.mkdir(parents=True, exist_ok=True)
        _write(out, json.dumps(results))
        plots.write(folder, {out.stem: results["metrics"]})
        print(json.dumps({name: value for name, value in results.items() if name != "examples"}, indent=2))


def _write(file: epath.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = file.parent / f".{file.name}.partial"
    partial.write_text(text)
    partial.replace(file)


def _compare(words: list[str]) -> None:
    """Compares evaluations: prints a page, and writes it with pictures where --out says."""
    from meap_jax.evals import plots

    parser = argparse.ArgumentParser(prog="python -m meap_jax.evaluate compare", description=_compare.__doc__)
    parser.add_argument("a", help="JSON of an evaluation; several, of runs of different seeds: A1.json,A2.json,...")
    parser.add_argument("b", help="the same of what is compared with it, in the same order")
    parser.add_argument("--out", help="folder for comparison.md and pictures; default: B-against-A beside B")
    args = parser.parse_args(words)
    files = [[Path(name) for name in side.split(",")] for side in (args.a, args.b)]
    if len(files[0]) != len(files[1]):
        raise ConfigError(
            f"{len(files[0])} evaluations against {len(files[1])}: give as many on both sides, in the order of seeds."
        )
    runs = [[compare.read_results(file) for file in side] for side in files]
    is_of_runs = len(runs[0]) > 1
    tables = compare.compare_runs(*runs) if is_of_runs else compare.compare(runs[0][0], runs[1][0])
    if not tables:
        raise ConfigError(
            f"{args.a} and {args.b} have no task with the same examples: evaluate both with equal --tasks."
        )
    names = plots.names_of([side[0] for side in files])
    out = Path(args.out or files[1][0].with_name(f"{files[1][0].stem}-against-{files[0][0].stem}"))
    out.mkdir(parents=True, exist_ok=True)
    page = compare.markdown(tables, names, is_of_runs)
    pictures = plots.write(out, dict(zip(names, (side[0]["metrics"] for side in runs), strict=True)))
    page += "".join(f"\n![{picture.stem}]({picture.name})\n" for picture in pictures)
    (out / "comparison.md").write_text(page)
    print(page)


if __name__ == "__main__":
    cli.run_command(command, joins_hosts=True)
