"""Command line of the S-TEC trainer: ``accelerate launch launch.py [train | eval | index | import | ...] [flags]``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tyro

from stec import __version__
from stec.config import EvalConfig, ImportConfig, IndexConfig, TrainConfig, read_config_file, with_settings
from stec.errors import Interrupted, UserError
from stec.recipes import RECIPES, flags, recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

    from pipelines.cache import Split
    from pipelines.images import Images
    from pipelines.loader import EvaluationLoader
    from stec.console import Console

# Before PyTorch is loaded: its idle threads shall sleep, not spin on the cores that DALI's threads need.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The profiler's library prints what it does, and an error where there is no GPU.
os.environ.setdefault("KINETO_LOG_LEVEL", "5")

C = TypeVar("C")


def is_main_process() -> bool:
    """Whether this is the process that speaks, before Accelerate is loaded."""
    return os.environ.get("RANK", "0") == "0"


def parse(kind: type[C], arguments: list[str], *, name: str, default: C | None = None, epilogue: str = "") -> C:
    """A configuration from flags; on a mistake tyro explains it and exits with code 2."""
    return tyro.cli(  # type: ignore[call-overload]
        kind,
        prog=f"launch.py {name}".rstrip(),
        description=(kind.__doc__ or "") + epilogue,
        args=arguments,
        use_underscores=True,
        console_outputs=is_main_process(),
        **({} if default is None else {"default": default}),
    )


def parse_train(arguments: list[str]) -> tuple[TrainConfig, bool]:
    """The configuration that the flags ask for, and whether it is only to be printed.

    Later beats earlier: defaults, recipe, config file, flags.
    """
    # These three decide what the other flags' defaults are, so they are read first.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    first.add_argument("--config", type=Path)
    first.add_argument("--print_config", action="store_true")
    first.add_argument("--dataset")
    chosen, rest = first.parse_known_args(arguments)
    if chosen.dataset is not None:
        rest += ["--dataset", chosen.dataset]

    settings = read_config_file(chosen.config) if chosen.config else {}
    name = chosen.recipe
    if name is None and chosen.config is None and chosen.dataset in (None, "demo"):
        name = "demo"
    base = with_settings(recipe(name) if name else TrainConfig(), settings, str(chosen.config))
    epilogue = (
        f"\n\nBesides the options below: --recipe NAME ({', '.join(RECIPES)}) and --config FILE (a run's config.json) "
        "give defaults that options override; --print_config shows the outcome and stops."
    )
    config = parse(TrainConfig, rest, name="", default=base, epilogue=epilogue)
    config.validate()
    return config, chosen.print_config


def start(
    mixed_precision: str, process_timeout_s: int = 1800, deterministic: bool = False
) -> tuple[Accelerator, Console, str]:
    """Accelerate, the console and the precision that was chosen, for any command that computes."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    from stec.console import Console
    from stec.engine import resolve_precision

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve_precision(mixed_precision, device)
    # Accelerate does not yet know the option by its new name.
    warnings.filterwarnings("ignore", message=r".*broadcast_buffers.*is deprecated", category=FutureWarning)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=precision,
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(seconds=process_timeout_s)),
        ],
    )
    if accelerator.gradient_accumulation_steps != 1:
        raise UserError(
            f"Accelerate is set to {accelerator.gradient_accumulation_steps} gradient accumulation steps, which would "
            f"change the contrastive loss; set --gradient_accumulation_steps 1 for accelerate launch."
        )
    if deterministic:
        # Read when cuBLAS starts; without a fixed workspace it may sum in another order.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Filling fresh memory would only help code that reads it before writing.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cpu":
        # accelerate launch allows each process one thread unless told otherwise.
        torch.set_num_threads(own_cpus())
    return accelerator, Console(enabled=accelerator.is_main_process), precision


def own_cpus() -> int:
    """This process's share of the CPUs that may be used."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def workers(config: TrainConfig | EvalConfig) -> int:
    """DALI's threads or torchvision's worker processes of this process."""
    return own_cpus() if config.num_workers is None else config.num_workers


def check_processes(config: TrainConfig, processes: int) -> None:
    """Raise UserError with the right launch line where Accelerate started other processes than the flags say."""
    if config.gpus is None and config.num_nodes is None:
        return
    nodes = config.num_nodes or 1
    wanted = (config.gpus or 1) * nodes
    if wanted != processes:
        machines = f" --num_machines {nodes}" if nodes > 1 else ""
        several = " --multi_gpu" if wanted > 1 else ""
        flags_given = shlex.join(sys.argv[1:])
        raise UserError(
            f"--gpus {config.gpus or 1} on {nodes} machine(s) means {wanted} process(es), but {processes} started; "
            f"launch with: accelerate launch{several} --num_processes {wanted}{machines} launch.py {flags_given}"
        )


def evaluation_loader(config: TrainConfig | EvalConfig, images: Images, accelerator: Accelerator) -> EvaluationLoader:
    from pipelines.loader import EvaluationLoader

    return EvaluationLoader(
        images,
        size=config.traits.view_size_px,
        resize_px=config.traits.resize_px,
        batch_size=config.batch_size,
        backend=config.backend,
        device=accelerator.device,
        workers=workers(config),
    )


def train(arguments: list[str]) -> None:
    """Train, evaluate and export."""
    config, only_print = parse_train(arguments)
    if only_print:
        print(json.dumps(config.to_json(), indent=2))
        return
    if config.stop_gradient == 2 and config.ckpt_path is None:
        raise UserError("--stop_gradient 2 trains the probe of a trained encoder; name its weights by --ckpt_path.")

    from stec import stops

    with stops.at_once(config.stop_exit_code):
        run_training(config)


def warn(text: str) -> None:
    """A function of the module, as DataLoader's workers may be sent a copy."""
    print(text, file=sys.stderr)


def run_training(config: TrainConfig) -> None:
    """From a configuration to a run's files."""
    accelerator, console, precision = start(
        config.mixed_precision, config.process_timeout_s, bool(config.deterministic)
    )
    check_processes(config, accelerator.num_processes)

    import torch

    from pipelines.bad_images import BadImages
    from pipelines.index import open_data_set
    from pipelines.loader import Loader
    from pipelines.order import Order
    from stec import engine, failures
    from stec.commands import PROBE_STREAM, Policy
    from stec.run_folder import open_run_folder

    device = accelerator.device
    with console.counting() as progress:
        data_set = engine.main_process_first(
            accelerator,
            lambda: open_data_set(
                config.dataset,
                config.data_dir,
                limit_train=config.limit_train,
                download=bool(config.download) and accelerator.is_main_process,
                progress=progress,
            ),
        )
    if config.stop_gradient == 2 and not data_set.classes:
        raise UserError(f"--stop_gradient 2 trains a probe, but --dataset {config.dataset} has no labels.")
    policy = Policy.of(config)
    bad = BadImages(data_set.train, max_share=config.max_bad_share)
    sharing: dict[str, Any] = {
        "seed": config.seed,
        "batch_size": config.batch_size,
        "process_index": accelerator.process_index,
        "num_processes": accelerator.num_processes,
        "accumulate": config.accumulate,
        "view_size_at": config.view_size_at if config.resolution_schedule is not None else None,
    }
    order = Order(data_set.train, policy, **sharing, bad=bad, shuffle_window=config.shuffle_window)
    probe_order = None
    if data_set.labelled is not None and data_set.labelled is not data_set.train:
        # As in the official code: one view of a labelled image beside each unlabelled one, not blurred or solarized.
        probe_order = Order(
            data_set.labelled,
            dataclasses.replace(policy, p_blur=0.0, p_solarize=0.0),
            **sharing,
            views=1,
            command_stream=PROBE_STREAM,
            epoch_length=len(data_set.train),
        )
        if config.stop_gradient == 2:
            order, probe_order = probe_order, None
    loader = Loader(
        order,
        backend=config.backend,
        device=device,
        workers=workers(config),
        probe_order=probe_order,
        # DALI knows no bfloat16; float16 holds [0, 1] more finely.
        half=device.type == "cuda" and precision != "no",
    )
    labelled, test = (
        None if images is None else evaluation_loader(config, images, accelerator)
        for images in (data_set.labelled, data_set.test)
    )
    data = engine.Data(
        training=loader,
        labelled=labelled,
        test=test,
        classes=len(data_set.classes),
    )
    environment = {
        "stec": __version__,
        "torch": str(torch.__version__),
        "python": sys.version.split()[0],
        "command": sys.argv,
        "processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": precision,
        "backend": loader.backend,
        "training_images": len(data_set.train),
    }
    model = engine.initial_model(config, data.classes)
    folder, resumed, notes = engine.on_main_process(accelerator, lambda: open_run_folder(config, environment))
    bad.list_in(folder.bad_images, say=warn)
    console.facts(
        title(config),
        [
            (
                "data",
                f"{config.dataset}: {len(data_set.train)} training images"
                + (f" ({bad.count} of them bad)" if bad.count else "")
                + (f", {len(data_set.test)} test images" if data_set.test is not None else ", no labels"),
            ),
            ("encoder", f"{config.arch}, width {config.width}"),
            (
                "training",
                f"{config.max_epochs} epochs of {order.steps_per_epoch} steps of {order.global_batch_size} images",
            ),
            ("machine", f"{accelerator.num_processes} process(es) on {environment['device']}, precision {precision}"),
            (
                "views",
                f"{config.view_size_px} px"
                + (f", {config.view_size_at(0)} px at first" if config.resolution_schedule is not None else ""),
            ),
            ("pipeline", f"{loader.backend}, {loader.workers} thread(s) or worker(s) per process"),
            ("files", str(folder.path.resolve())),
        ],
    )
    for note in notes:
        console.say(note)
    if resumed is not None:
        console.say(f"Going on after step {resumed['step']}.")
    with failures.shared():
        results = engine.train(
            config,
            data,
            model,
            accelerator=accelerator,
            console=console,
            folder=folder,
            environment=environment,
            resumed=resumed,
        )
    show_results(console, results)
    console.say(f"The run's files are in {folder.path.resolve()}")
    accelerator.end_training()


def title(config: TrainConfig) -> str:
    """What a run is called."""
    if config.stop_gradient == 2:
        return "Linear fit (only the probe is trained: --stop_gradient is 2)"
    return "S-TEC" if config.manip_lambda > 0 else "SimCLR (no inverse model: --manip_lambda is 0)"


def show_results(console: Console, results: dict[str, float]) -> None:
    """The closing table of a run."""

    def percent(name: str) -> str:
        return f"{results[name]:.1%}" if name in results else "-"

    rows = [
        ["kNN (k = 20) top-1", percent("knn20_before"), percent("knn20_after")],
        ["probe top-1, fitted afresh", percent("linear_fit_before"), percent("linear_fit_after")],
        ["probe top-1, trained online", percent("probe_before"), percent("probe_after")],
        ["inverse model, accuracy per entry", "-", percent("inverse_model_accuracy")],
        ["images/s", "-", f"{results['images_per_second']:.0f}"],
        ["share of time waiting for data", "-", percent("wait_share")],
    ]
    measured = [row for row in rows if row[1:] != ["-", "-"]]
    heading = "Results on the test images" if "probe_after" in results else "Results"
    console.table(heading, ["", "before training", "after training"], measured)


def evaluate(arguments: list[str]) -> None:
    """Evaluate a trained encoder and its probe on the test images; the last line printed is the accuracy."""
    config = parse(EvalConfig, arguments, name="eval")
    config.validate()
    accelerator, console, precision = start(config.mixed_precision)

    from pipelines.index import open_test_images
    from stec import engine
    from stec.evaluate import evaluate_probe, extract_features
    from stec.export import load_weights, read_weights_and_settings
    from stec.model import DEFAULT_HIDDEN_MLP, Model
    from stec.run_folder import write_json

    state, settings = read_weights_and_settings(config.ckpt_path)
    with console.counting() as progress:
        images, classes = engine.main_process_first(
            accelerator,
            lambda: open_test_images(
                config.dataset,
                config.data_dir,
                download=bool(config.download) and accelerator.is_main_process,
                progress=progress,
            ),
        )
    known_arch = settings["arch"] if settings.get("arch") in DEFAULT_HIDDEN_MLP else "resnet18"
    model = Model(
        arch=config.arch or known_arch,
        stem=config.traits.stem,
        classes=len(classes),
        width=config.width or int(settings.get("width", 64)),
        with_inverse_model=False,
    )
    wanted = {name: tensor for name, tensor in state.items() if name.startswith(("encoder.", "probe."))}
    load_weights(model, wanted, config.ckpt_path, required=("encoder", "probe"))
    model.to(accelerator.device)
    loader = evaluation_loader(config, images, accelerator)
    console.say(f"{config.ckpt_path} on the {len(loader)} test images of {config.dataset}, precision {precision}")
    with console.waiting("evaluating"):
        assert model.probe is not None
        results = evaluate_probe(model.probe, extract_features(model.encoder, loader, accelerator))
    if config.json is not None and accelerator.is_main_process:
        write_json(config.json, {"dataset": config.dataset, "ckpt_path": str(config.ckpt_path), **results})
    console.say(f"loss {results['loss']:.4f}")
    console.say(f"top5_accuracy {results['top5_accuracy']:.4f}")
    console.say(f"accuracy {results['accuracy']:.4f}")
    accelerator.end_training()


def index(arguments: list[str]) -> None:
    """Index every split of a data set of image files or shards, and tell what it holds and which images are bad."""
    config = parse(IndexConfig, arguments, name="index")
    if config.bad.is_dir() or not config.bad.parent.is_dir():
        raise UserError(f"--bad {config.bad} cannot be written; name a file in an existing folder.")

    from pipelines.cache import cache_file
    from pipelines.index import check_labels, splits_below
    from pipelines.splits import read_split, verified
    from stec.console import Console
    from stec.run_folder import write_text

    console = Console(enabled=is_main_process())
    splits: dict[str, Split] = {}
    facts = []
    with console.counting() as progress:
        for name, (root, kind) in splits_below(config.data_dir).items():
            started = time.perf_counter()
            split = read_split(root, kind, progress)
            if config.verify == "full":
                split = verified(split, kind, progress)
            check_labels(split)
            kept = cache_file(root, kind)
            facts.append(
                {
                    **index_facts(split),
                    "seconds": f"{time.perf_counter() - started:.1f}",
                    "index": str(kept) if kept.exists() else f"{kept} could not be written",
                }
            )
            splits[name] = split
    rows = [[fact, *(of_split[fact] for of_split in facts)] for fact in facts[0]]
    console.table(f"Index of {config.data_dir}", ["", *splits], rows)
    for split in splits.values():
        for remark in split.remarks:
            console.say(f"{remark}.")
    bad = [(split.images.name(n), why) for split in splits.values() for n, why in split.images.faults.items()]
    for name, why in bad[:10]:
        console.say(f"Bad image: {name} ({why})")
    if config.verify == "full":
        # A name may hold anything but a zero byte; a line of the list holds one name.
        lines = (f"{name}\t{why}".translate({10: " ", 13: " "}) + "\n" for name, why in bad)
        write_text(config.bad, "".join(lines))
        console.say(f"{len(bad)} bad images are listed in {config.bad}.")
    elif len(bad) > 10:
        console.say(f"... and {len(bad) - 10} more; --verify full lists them all.")


def index_facts(split: Split) -> dict[str, str]:
    """What ``launch.py index`` tells about a split."""
    import numpy as np

    images = split.images
    good = np.setdiff1d(np.arange(len(images)), list(images.faults))
    odd = good[images.needs_pillow[good]]
    kinds = Counter(Path(images.name(n)).suffix.lower() for n in odd.tolist()).most_common()
    by_area = images.sizes[good][np.argsort(images.sizes[good].prod(axis=1), kind="stable")]
    smallest, median, largest = (f"{height} x {width}" for height, width in by_area[[0, len(by_area) // 2, -1]])
    return {
        "layout": split.layout,
        "images": str(len(images)),
        "classes": str(len(split.classes)) if split.classes else "no labels",
        "bytes": str(images.size_bytes.sum()),
        "smallest image, px": smallest,
        "median image, px": median,
        "largest image, px": largest,
        "decoded by Pillow": ", ".join(f"{count} {kind}" for kind, count in kinds) or "0",
        "bad images": str(len(images.faults)),
    }


def import_checkpoint(arguments: list[str]) -> None:
    """Turn a checkpoint into a safetensors file under our names."""
    config = parse(tyro.conf.Positional[ImportConfig], arguments, name="import")
    if config.out.suffix != ".safetensors":
        raise UserError(f"{config.out} must end in .safetensors, the format that is written.")

    from stec.export import read_weights, write_safetensors

    state = read_weights(config.checkpoint)
    write_safetensors(state, config.out, {"imported_from": config.checkpoint.name})
    values = sum(tensor.numel() for tensor in state.values())
    print(f"{config.out}: {len(state)} tensors, {values} values")


def list_recipes(arguments: list[str]) -> None:
    """Show the recipes and the flags that they stand for."""
    if arguments:
        raise UserError(f"launch.py recipes takes no arguments, but got {' '.join(arguments)}.")

    from stec.console import Console

    rows = [[name, flags(make())] for name, make in RECIPES.items()]
    Console(enabled=is_main_process()).table("Recipes", ["--recipe", "stands for"], rows, numbers=False)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "eval": evaluate,
    "index": index,
    "import": import_checkpoint,
    "recipes": list_recipes,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the first argument names (default: train); returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "train"
    try:
        if name not in COMMANDS:
            raise UserError(f"{name} is no command; known are {', '.join(COMMANDS)}, and without one launch.py trains.")
        COMMANDS[name](arguments)
    except UserError as error:
        if is_main_process():
            print(f"error: {error}", file=sys.stderr)
        elif error.local:
            print(f"error on process {os.environ['RANK']}: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        if is_main_process():
            print(stop, file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        if is_main_process():
            how_to_go_on = "; a run goes on from its last checkpoint by --resume auto" * (name == "train")
            print(f"Stopped at once{how_to_go_on}.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
