"""Evaluate a trained encoder and its probe on the test images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stec.errors import UserError
from subcommands.common import EncoderConfig, evaluation_loader, parse, start


@dataclass(frozen=True, kw_only=True)
class EvalConfig(EncoderConfig):
    """Evaluate a trained encoder and its probe on the test images."""

    json: Path | None = None
    """Also write the results to this file."""

    def validate(self) -> None:
        """Raise UserError for the first setting that is out of its range."""
        super().validate()
        if self.json is not None and (self.json.is_dir() or not self.json.parent.is_dir()):
            raise UserError(f"--json {self.json} cannot be written; name a file in an existing folder.")


def run(arguments: list[str]) -> None:
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
