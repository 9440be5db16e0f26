"""``moeplace plan``: which cluster, which topology, which split, at what cost per token."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

import click

from moeplace.cli import EXIT_INTERRUPTED
from moeplace.cli.inputs import check_paths, open_source, warn
from moeplace.cli.options import common, option, threads, trace_input
from moeplace.cli.values import Duration, Share, Whole

if TYPE_CHECKING:
    from moeplace.planning.deployment import Deployment
    from moeplace.planning.evaluate import Evaluator
    from moeplace.planning.search import Found
    from moeplace.planning.space import Space

EPILOG = """\b
Examples:
  moeplace plan trace.npz --model deepseek-v3 --context 4096
  moeplace plan trace.npz --model deepseek-v3 --tpot 50 --max-price 3000000 --results plan.jsonl
  moeplace plan trace.npz --topologies torus:4x4x4,scale-up --accelerators h100 --batches 32,64 --json
  moeplace plan trace.npz --overlaps none,ping-pong --attention-accelerators h20 --accelerators l40s
  moeplace plan trace.npz --link-scales 0.25,0.5,1 --ep-sizes 64 --prices mine.toml --plot plan.png
  moeplace plan trace.npz --model deepseek-v3 --ep-sizes 64 --explain 09b1fab
  moeplace plan trace.npz --wafer 8x8 --accelerators tpu-v5p --batches 4
"""
EXIT_INFEASIBLE, EXIT_NOTHING_FOUND = 3, 4
EVALUATED = ("model", "prices", "network_share", "solver", "threads", "context", "prompt", "steps", "seed")


class Listed(click.ParamType):  # type: ignore[type-arg] # generic since click 8.4
    """Comma-separated values, each at least ``low`` where they are numbers."""

    def __init__(self, kind: type, low: float = 0) -> None:
        self.kind, self.low = kind, low
        self.name = "names" if kind is str else "n,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        """Read the list; what is given twice counts once."""
        if isinstance(value, tuple | list):
            value = ",".join(map(str, value))
        texts = [text.strip() for text in str(value).split(",") if text.strip()]
        try:
            found = tuple(dict.fromkeys(self.kind(text) for text in texts))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 8,16,32", param, ctx)
        if not found or (self.kind is not str and not all(self.low <= item < math.inf for item in found)):
            self.fail(f"{value!r}: at least one value, each {self.low:g} or more", param, ctx)
        return found


@click.command("plan", epilog=EPILOG)
@trace_input
@option("--topologies", "-t", type=Listed(str), help="Kinds or KIND:DIMS; default scale-up,scale-out,torus,full-mesh.")
@option("--accelerators", type=Listed(str), help="Presets or TOML files; default h100,h200,b200.")
@option("--ep-sizes", type=Listed(int, 1), help="GPUs that hold a layer's experts; default 8,16,32,64,128,256.")
@option("--batches", type=Listed(int, 1), help="Requests that decode on each GPU; default 16,32,64,128,256.")
@option("--redundant", type=Listed(int, 0), default="0", help="Extra expert slots per layer, in total.")
@option("--attention-tps", type=Listed(int, 1), default="1", help="GPUs that share the attention of a request.")
@option(
    "--overlaps",
    type=Listed(str),
    default="none,dual-batch",
    help="none, dual-batch, or ping-pong between GPUs of two kinds.",
)
@option("--attention-accelerators", type=Listed(str), help="Of ping-pong: what attention may run on; default: all.")
@option("--micro-batches", type=Listed(int, 1), default="3,4", help="Of ping-pong: numbers of micro-batches to try.")
@option("--link-scales", type=Listed(float, 1e-3), default="1", help="Multiples of the scale-up bandwidth to try.")
@option("--context", type=click.FloatRange(min=1), help="Tokens a decoding request looks at; default: the trace's.")
@option("--prompt", type=Whole(1), help="Tokens of a prompt, for --ttft; default: the trace's median.")
@option("--tpot", type=click.FloatRange(min=0, min_open=True), help="Most ms per output token, at --percentile.")
@option("--ttft", type=click.FloatRange(min=0, min_open=True), help="Most ms to the first token, without queueing.")
@option("--percentile", type=click.FloatRange(1, 99.9), default=95.0, help="Of step times that the limits are for.")
@option("--max-gpus", type=Whole(1), help="Most GPUs of an instance.")
@option("--max-price", type=click.FloatRange(min=0, min_open=True), help="Most that an instance may cost to buy.")
@option("--prices", metavar="NAME", default="street", help="Price book (moeplace list prices) or a TOML file.")
@option("--network-share", type=Share(), help="Scale network prices to this share of a scale-up cluster's price.")
@option("--solver", "-s", default="balance+relabel", help="Who places experts (moeplace list solvers).")
@option("--fit", metavar="SPLIT", default="half:0", help="Part that placements are fitted on; judged on the rest.")
@option("--steps", type=Whole(4), default=32, help="Steps drawn for each deployment.")
@option("--seed", type=Whole(0), default=0, help="Seed of draws and solvers.")
@option("--time-limit", type=Duration(), help="Judge no further deployment after this time: 90, 90s, 5m.")
@option("--results", type=click.Path(dir_okay=False), help="File that keeps every outcome: the search goes on there.")
@option("--plot", metavar="FILE", help="Draw cost against latency, and against bandwidth: FILE ends in png, pdf, svg.")
@option("--wafer", metavar="ROWSxCOLUMNS", help="Compare placements on a mesh of dies (first accelerator) instead.")
@option("--explain", metavar="ID", help="Show one deployment's budget of time, money and memory instead.")
@threads
@common
def plan_command(trace: str, **options: Any) -> int:
    """Find the cluster, topology and split that serve a TRACE at the least cost per token.

    Every deployment is placed by a solver, timed on steps drawn from the trace and priced by a dated price book; shown
    are those that no other beats in cost, throughput per GPU, energy and time per token. A deployment is one instance;
    a larger cluster holds several. Times are model outputs and prices assumptions: read ratios, and replace what you
    know better.
    """
    from moeplace.planboard import PlanLog, write_front
    from moeplace.planning.document import plan_to_dict
    from moeplace.planning.explain import network_sentences, price_sentences, workload_sentences
    from moeplace.planning.figures import check_figures, draw_plan
    from moeplace.planning.search import Results, search
    from moeplace.planning.space import deployments
    from moeplace.report import write_json

    check_paths([trace], options["results"])
    if options["plot"]:
        check_figures(options["plot"])
    space, evaluator, fitted = _setup(trace, options)
    if options["wafer"]:
        return _wafer(space, evaluator, options)
    found = deployments(space, evaluator.workload.model, evaluator.workload.context)
    if options["explain"]:
        return _explain(options["explain"], found, evaluator, as_json=options["as_json"])
    assumed = (
        *workload_sentences(evaluator, fitted),
        *network_sentences(evaluator, found),
        *price_sentences(evaluator),
    )
    warn(assumed, quiet=options["quiet"] or options["as_json"])
    result = search(
        found,
        evaluator,
        threads=options["threads"],
        time_limit_s=options["time_limit"] or math.inf,
        results=Results(options["results"], evaluator) if options["results"] else None,
        tell=PlanLog(shown=not options["quiet"] and (options["verbose"] or sys.stderr.isatty())),
    )
    if options["as_json"]:
        write_json(plan_to_dict(result, evaluator, assumed))
    else:
        write_front(result, evaluator.book, evaluator.demands.percentile)
    if options["plot"]:
        for file in draw_plan(result.outcomes, evaluator.book, options["plot"]):
            click.echo(f"drawn: {file}", err=True)
    return _exit_code(result, options)


def _exit_code(result: Found, options: dict[str, Any]) -> int:
    if result.unjudged:
        kept = f"; {options['results']} keeps them: the same command goes on" if options["results"] else ""
        click.echo(f"{len(result.outcomes):,} deployments judged, {result.unjudged:,} left{kept}", err=True)
    if result.interrupted:
        return EXIT_INTERRUPTED
    if any(outcome.feasible for outcome in result.outcomes):
        return 0
    return EXIT_NOTHING_FOUND if result.unjudged else EXIT_INFEASIBLE


def _setup(trace: str, options: dict[str, Any]) -> tuple[Space, Evaluator, str]:
    """What is searched, who judges it, and on what placements are fitted."""
    from moeplace.planning.evaluate import Demands
    from moeplace.planning.run import make_evaluator
    from moeplace.planning.space import DEFAULT_ACCELERATORS
    from moeplace.solvers import AUTO, load_solver

    for part in options["solver"].split("+"):
        if part != AUTO:
            load_solver(part)
    accelerators = _accelerators(options["accelerators"] or DEFAULT_ACCELERATORS)
    attention = _accelerators(options["attention_accelerators"] or ())
    demands = Demands(
        tpot_ms=options["tpot"],
        ttft_ms=options["ttft"],
        percentile=options["percentile"],
        max_gpus=options["max_gpus"],
        max_usd=options["max_price"],
    )
    evaluator = make_evaluator(
        open_source(trace, options, split=options["fit"]),
        open_source(trace, options, split=options["fit"], part="test"),
        {**accelerators, **attention},
        demands=demands,
        **{name: options[name] for name in EVALUATED},
    )
    fitted = f"fitted on {options['fit']} of the requests and judged on the others"
    return _space((accelerators, attention), options), evaluator, fitted


def _accelerators(names: tuple[str, ...]) -> dict[str, Any]:
    from moeplace.hardware import load_accelerator

    loaded = [load_accelerator(name) for name in names]
    return {each.name: each for each in loaded}


def _space(accelerators: tuple[dict[str, Any], dict[str, Any]], options: dict[str, Any]) -> Space:
    from moeplace.planning.space import DEFAULT_BATCHES, DEFAULT_EP_SIZES, DEFAULT_KINDS, Space

    return Space(
        kinds=options["topologies"] or DEFAULT_KINDS,
        accelerators=accelerators[0],
        attention_accelerators=accelerators[1],
        micro_batches=options["micro_batches"],
        ep_sizes=options["ep_sizes"] or DEFAULT_EP_SIZES,
        batches=options["batches"] or DEFAULT_BATCHES,
        redundant=options["redundant"],
        attention_tps=options["attention_tps"],
        overlaps=options["overlaps"],
        link_scales=options["link_scales"],
    )


def _wafer(space: Space, evaluator: Evaluator, options: dict[str, Any]) -> int:
    from dataclasses import asdict

    from moeplace.planboard import write_wafer
    from moeplace.planning.space import lengths
    from moeplace.planning.wafer import compare_wafer
    from moeplace.report import write_json
    from moeplace.topology import build_topology

    mesh = build_topology("mesh", lengths(options["wafer"], "mesh"), next(iter(space.accelerators.values())))
    rows = compare_wafer(evaluator.workload, evaluator.stats, mesh, space.batches[0])
    if options["as_json"]:
        shown = [{k: v if isinstance(v, str) else round(v, 6) for k, v in asdict(row).items()} for row in rows]
        document = {"schema": "moeplace/plan-wafer/1", "topology": mesh.name, "accelerator": mesh.accelerator.name}
        write_json({**document, "batch": space.batches[0], "rows": shown})
    else:
        write_wafer(rows)
    return 0


def _explain(wanted: str, found: list[Deployment], evaluator: Evaluator, *, as_json: bool) -> int:
    from moeplace.errors import unknown_name
    from moeplace.planboard import write_budget
    from moeplace.planning.search import judge
    from moeplace.report import write_json

    chosen = [own for own in found if own.id.startswith(wanted)]
    if len(chosen) != 1:
        raise unknown_name("deployment", wanted, [own.id for own in chosen or found][:20])
    outcome = judge(chosen[0], evaluator)
    if as_json:
        write_json({"schema": "moeplace/plan-deployment/1", **outcome.to_dict()})
    else:
        write_budget(outcome, evaluator.book)
    return 0
