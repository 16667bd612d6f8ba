"""Benchmark of LGAF on degraded faces: networks trained alike on synthetic faces, tested on other identities.

    python benchmarks/quality.py --folder DIR --json benchmarks/results/quality_cpu.json
    python benchmarks/quality.py --folder DIR --large --jobs 1       an R50, for one GPU: 100,000 identities,
                                                                        2 million images, generated meanwhile

Each network of NETWORKS is trained with each seed by `lgaf train configs/quality.toml`. For a seed, all
networks see the same images in the same order. Finished runs are not repeated. The twin is a plain IResNet,
widened until it needs at least as many operations as LGAF. Then each network is measured:

    images      held-out identities, generated for each condition: sharp, or with one kind of degradation in
                one of four strengths and no other change; and a sharp reference image of each identity
    accuracy    every reference against every image of a condition: 1 - equal error rate, TAR at FAR 1 %
    norms       mean norms of both of LGAF's branches, and its attention, for each condition
    advantage   how much better an image's local feature separates its identity from others than its global
                feature, and the correlation of the attention with it
    weights     the accuracy of LGAF with one constant weight in place of the attention, from the global
                branch alone to the local branch alone

The output has both figures per kind of degradation (mean over strengths and seeds, deviation over seeds),
LGAF's lead over its twin, the attention and its correlation with the advantage, and the gain of the best
constant weight for each kind. `--page` plots the norms and the attention.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.common.process_pool import in_order
from data_pipeline.synthetic.dataset import write_set
from data_pipeline.synthetic.face import Nuisances
from data_pipeline.synthetic.identities import HELD_OUT, SynthConfig, faces_of, nuisances_of
from data_pipeline.synthetic.render import render_face
from trainer import backbones
from trainer import config as run_config
from trainer.backbones import Backbone, BackboneConfig
from trainer.backbones.iresnet import IResNetConfig
from trainer.backbones.lgaf import LGAF
from trainer.evaluation.metrics.verification import roc
from trainer.inference.network import load_backbone
from trainer.report import charts
from trainer.report import page as report_page

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "quality.toml"
SEEDS = (1, 2, 3)
GLOBAL, LOCAL = 0, 1
LOCAL_WEIGHTS = [tenth / 10 for tenth in range(11)]

# Name -> changes of the configuration, which is LGAF's.
NETWORKS: dict[str, dict[str, Any]] = {
    "lgaf": {},
    "twin": {"name": "iresnet"},  # and a width of its own
    "equal weights": {"lgf.attention_scale": 0},
    "local only": {"local_only": True},
    "global only": {"name": "iresnet"},
}
LARGE_PEOPLE = SynthConfig(identities=100_000, images_per_identity=20, image_size=112)
LARGE = {
    "data.path": [],
    "data.num_classes": LARGE_PEOPLE.identities,
    "backbone.blocks": [3, 4, 14, 3],
    "backbone.width": 64,
    "backbone.stem_stride": 1,
    "backbone.embedding_size": 512,
    "data.image_size": 112,
    "data.threads": 8,
    "engine.precision": "auto",
    "global_batch": 512,
    "steps": 20_000,
    "checkpoint.every_steps": 2000,
    "head.sample_rate": 0.3,
}

# Kind -> strengths: half side of a block and warp in face units; standard deviation and length in pixels at a
# width of 112; share of the resolution; degrees.
KINDS: dict[str, tuple[float, ...]] = {
    "occlusion": (0.3, 0.45, 0.6, 0.75),
    "deformation": (0.04, 0.08, 0.12, 0.16),
    "blur": (1.0, 2.0, 3.0, 4.5),
    "motion blur": (4.0, 8.0, 12.0, 18.0),
    "low resolution": (0.35, 0.25, 0.17, 0.12),
    "pose": (20.0, 32.0, 44.0, 56.0),
}
CONDITIONS = [("none", 0.0)] + [
    (kind, strength) for kind, strengths in KINDS.items() for strength in strengths
]
TAKES = 3  # pairs of a reference and its images, per identity
CALM = 0.5  # difficulty of all nuisances that no condition changes: light, colours, expression


def degraded(calm: Nuisances, kind: str, strength: float) -> Nuisances:
    """Return the nuisances of an image under a condition; motion blur is applied after rendering."""
    match kind:
        case "occlusion":
            return calm._replace(occlusion="block", occlusion_size=strength)
        case "deformation":
            return calm._replace(warp=strength)
        case "blur":
            return calm._replace(blur_px=strength)
        case "low resolution":
            return calm._replace(resolution=strength)
        case "pose":
            return calm._replace(yaw_deg=math.copysign(strength, calm.yaw_deg))
    return calm


def motion_blurred(image: Image.Image, length_px: float, angle: float) -> Image.Image:
    """Return the mean of an image shifted along a line; `length_px` is in pixels at a width of 112."""
    steps = 1 + math.ceil(length_px)
    total_HWC = np.zeros((image.height, image.width, 3), np.float32)
    for at in np.linspace(-0.5, 0.5, steps) * length_px * image.width / 112:
        shift = (1, 0, at * math.cos(angle), 0, 1, at * math.sin(angle))
        total_HWC += np.asarray(
            image.transform(image.size, Image.Transform.AFFINE, shift, Image.Resampling.BILINEAR)
        )
    return Image.fromarray((total_HWC / steps).astype(np.uint8))


def identity_images(seed: int, identity: int, size: int) -> np.ndarray:
    """Return uint8 [takes, 1 + conditions, H, W, 3]: per take a reference and an image per condition."""
    numbers = np.arange(2 * TAKES)
    face = faces_of(seed, np.array([identity]))[0]
    calm = [
        n._replace(occlusion="none", warp=0.0, blur_px=0.0, resolution=1.0)
        for n in nuisances_of(seed, np.full(2 * TAKES, identity), numbers, CALM)
    ]
    takes = []
    for reference, probe in zip(calm[0::2], calm[1::2], strict=True):
        row = [render_face(face, reference, size)]
        for kind, strength in CONDITIONS:
            image = render_face(face, degraded(probe, kind, strength), size)
            angle = math.radians(probe.shadow_angle_deg)
            row.append(motion_blurred(image, strength, angle) if kind == "motion blur" else image)
        takes.append([np.asarray(image) for image in row])
    return np.array(takes)


@dataclass(frozen=True, eq=False)
class Seen:
    """Outputs of a network for N takes of S images, the reference first: unit embeddings, and for each of K
    branches the unit feature, the norm and the attention weight."""

    emb_NSD: np.ndarray
    unit_NSKD: np.ndarray
    norm_NSK: np.ndarray
    weight_NSK: np.ndarray


@torch.inference_mode()
def forward(model: Backbone, images: Iterable[np.ndarray], device: torch.device) -> Seen:
    """Run the network on the images of all identities."""
    model.eval().to(device)
    rows = []
    for image_TSHWC in images:
        pixels = torch.from_numpy(image_TSHWC).to(device).flatten(0, 1).permute(0, 3, 1, 2)
        images_BCHW = (pixels.float() - 127.5) / 127.5
        if isinstance(model, LGAF):
            fusion = model.fuse(images_BCHW)
            row = (fusion.emb_BD, fusion.unit_BKD, fusion.norm_BK, fusion.weight_BK)
        else:
            emb_BD = model(images_BCHW).emb_BD
            norm_B1 = emb_BD.norm(dim=1, keepdim=True)
            row = (emb_BD, (emb_BD / norm_B1)[:, None], norm_B1, torch.ones_like(norm_B1))
        rows.append([part.unflatten(0, image_TSHWC.shape[:2]).cpu().numpy() for part in row])
    emb_NSD, *of_branches = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    return Seen(normalized(emb_NSD), *of_branches)


def normalized(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def accuracy(emb_NSD: np.ndarray) -> np.ndarray:
    """Return 1 - EER and TAR at FAR 1 %, [conditions, 2], of every reference against every image."""
    issame_P = same_identity(len(emb_NSD)).ravel()
    figures = []
    for emb_ND in emb_NSD[:, 1:].swapaxes(0, 1):
        similarity_P = (emb_NSD[:, 0] @ emb_ND.T).ravel()
        far_R, tar_R = roc(similarity_P[issame_P], similarity_P[~issame_P])
        crossing = int(np.argmax(far_R >= 1 - tar_R))
        figures.append((1 - (far_R[crossing] + 1 - tar_R[crossing]) / 2, np.interp(0.01, far_R, tar_R)))
    return np.array(figures)


def same_identity(takes: int) -> np.ndarray:
    """Return bool [N, N], true where two takes show one identity."""
    identity_N = np.arange(takes) // TAKES
    return identity_N[:, None] == identity_N


def tar_by_weight(unit_NSKD: np.ndarray) -> list[list[float]]:
    """Return TAR at FAR 1 %, [LOCAL_WEIGHTS, conditions], with one weight for all images and references."""
    fused = ((1 - w) * unit_NSKD[:, :, GLOBAL] + w * unit_NSKD[:, :, LOCAL] for w in LOCAL_WEIGHTS)
    return [accuracy(normalized(emb_NSD))[:, 1].tolist() for emb_NSD in fused]


def advantage(unit_NSKD: np.ndarray) -> np.ndarray:
    """Return the quality of each image's local feature minus that of its global feature, [N, S].

    The quality is the cosine to the reference of the same take, minus the mean cosine to the references of
    other identities, divided by their standard deviation, because the branches' cosines have other spreads.
    """
    is_other_NN = ~same_identity(len(unit_NSKD))
    goodness = []
    for k in (GLOBAL, LOCAL):
        cosine_SNN = np.einsum("md,nsd->smn", unit_NSKD[:, 0, k], unit_NSKD[:, :, k])
        other_SN, spread_SN = (reduce(cosine_SNN, axis=1, where=is_other_NN) for reduce in (np.mean, np.std))
        own_SN = np.diagonal(cosine_SNN, axis1=1, axis2=2)
        goodness.append((own_SN - other_SN) / spread_SN)
    return (goodness[LOCAL] - goodness[GLOBAL]).T


def by_kind(figure_S: np.ndarray) -> dict[str, float]:
    """Return the mean of each kind over its strengths, and under "degraded" the mean of all but "none"."""
    kinds = np.array([kind for kind, _ in CONDITIONS])
    means = {kind: float(figure_S[kinds == kind].mean()) for kind in ("none", *KINDS)}
    return means | {"degraded": float(np.mean([means[kind] for kind in KINDS]))}


def words(options: argparse.Namespace, name: str) -> list[str]:
    """Return the KEY=VALUE settings of `lgaf train` for this network."""
    backbone = dict(NETWORKS[name])
    if name == "twin":
        backbone["width"] = options.twin_width
    given: dict[str, object] = {}
    if backbone.pop("name", None) == "iresnet":
        # The file's table is LGAF's and has keys that an IResNet lacks.
        given["backbone"] = plain_trunk(run_config.load(CONFIG, []).backbone).model_dump(exclude={"weights"})
    given |= {"data.path": str(options.folder / "people"), "run_dir": str(options.folder / "run")}
    if options.large:
        given |= LARGE | {"data.shards": [shards_rendered_while_training(LARGE_PEOPLE)]}
    given |= {f"backbone.{key}": value for key, value in backbone.items()}
    return [f"{key}={as_toml(value)}" for key, value in given.items()] + options.set


def plain_trunk(config: BackboneConfig) -> IResNetConfig:
    """Return the configuration of an LGAF's trunk alone."""
    return IResNetConfig(**config.model_dump(include=set(IResNetConfig.model_fields) - {"name"}))


def as_toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {as_toml(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def shards_rendered_while_training(people: SynthConfig) -> str:
    """Return the shards' URL for images that the training renders itself and does not store."""
    keys = people.model_dump(include={"identities", "images_per_identity", "image_size"})
    given = " ".join(f"--set {key}={value}" for key, value in keys.items())
    return f"pipe:lgaf data render {{0..49}}/50 {given}"


def configured(options: argparse.Namespace, name: str) -> run_config.RunConfig:
    return run_config.load(CONFIG, words(options, name))


@torch.inference_mode()
def operations(config: BackboneConfig, image_size: int) -> int:
    """Return the number of multiplications and additions for one image."""
    model = backbones.build(config, image_size).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, image_size, image_size))
    return counter.get_total_flops()


def twin_width(options: argparse.Namespace) -> int:
    """Return the least width of a plain IResNet that needs at least as many operations as LGAF."""
    config = configured(options, "lgaf")
    size, width = config.data.image_size, config.backbone.width
    goal = operations(config.backbone, size)
    plain = plain_trunk(config.backbone)
    while operations(plain.model_copy(update={"width": width}), size) < goal:
        width += 1
    return width


def train(options: argparse.Namespace, name: str, seed: int) -> Backbone:
    run_dir = options.folder / f"{name.replace(' ', '_')}-{seed}"
    out = run_dir.with_suffix(".pt")
    given = [*words(options, name), f"run_dir={json.dumps(str(run_dir))}", f"seed={seed}"]
    # A finished run is not repeated, and a run with another configuration is refused.
    lgaf(["train", str(CONFIG), *(word for one in given for word in ("--set", one))], options.threads)
    lgaf(["checkpoint", "extract", str(run_dir), "--out", str(out)], options.threads)
    print(f"{name}, seed {seed}: trained", file=sys.stderr)
    return load_backbone(out)


def lgaf(command: list[str], threads: int) -> None:
    # `lgaf` is in the folder of the Python interpreter.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-m", "trainer", *command], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"lgaf {' '.join(command)}\n{done.stderr}")


def attention(seen: list[Seen]) -> dict[str, Any]:
    """Return LGAF's norms and attention by condition, over all seeds.

    Norms are standardised with mean and deviation of sharp images; strengths are numbered from 0 to 4.
    """
    shifted = []
    for one in seen:
        sharp_NK = one.norm_NSK[:, 1]
        shifted.append((one.norm_NSK - sharp_NK.mean(0)) / sharp_NK.std(0))
    norm_NSK = np.concatenate(shifted)
    advantages = [advantage(one.unit_NSKD) for one in seen]
    return {
        "norm_mean_SK": norm_NSK[:, 1:].mean(0).tolist(),
        "norm_std_SK": norm_NSK[:, 1:].std(0).tolist(),
        "local_weight_RS": [one.weight_NSK[:, 1:, LOCAL].mean(0).tolist() for one in seen],
        "weight_and_advantage_R": {
            kind: [
                _within(one.weight_NSK[:, at, LOCAL], advantage_NS[:, at])
                for one, advantage_NS in zip(seen, advantages, strict=True)
            ]
            for kind, at in _columns().items()
        },
        "norms_of_both_branches": _correlation(norm_NSK[:, 1:, GLOBAL], norm_NSK[:, 1:, LOCAL]),
        "norm_and_strength": {
            kind: [
                _correlation(norm_NSK[:, columns, k], np.tile(np.arange(len(columns)), (len(norm_NSK), 1)))
                for k in (GLOBAL, LOCAL)
            ]
            for kind, columns in _columns().items()
        },
    }


def _columns() -> dict[str, list[int]]:
    """Return kind -> positions of its images in a take, from none to the greatest strength."""
    return {kind: [1, *(1 + s for s, (found, _) in enumerate(CONDITIONS) if found == kind)] for kind in KINDS}


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Return the correlation; 0 if one argument is constant, as weights are without attention."""
    if min(first.std(), second.std()) == 0:
        return 0.0
    return float(np.corrcoef(first.ravel(), second.ravel())[0, 1])


def _within(first_NS: np.ndarray, second_NS: np.ndarray) -> float:
    """Return the correlation of deviations from each strength's mean, without the drift between strengths."""
    return _correlation(first_NS - first_NS.mean(0), second_NS - second_NS.mean(0))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    if not options.large:
        write_set(
            options.folder / "people",
            SynthConfig(
                identities=options.people,
                images_per_identity=40,
                image_size=80,
                held_out_identities=2,
                pairs=2,
            ),
        )
    size = configured(options, "lgaf").data.image_size
    jobs = [(name, seed) for name in options.networks for seed in options.seeds]
    with ThreadPoolExecutor(options.jobs) as pool:
        models = list(pool.map(lambda job: train(options, *job), jobs))
    arguments = [(options.test_seed, HELD_OUT + number, size) for number in range(options.test_people)]
    images = list(in_order(identity_images, arguments, None))
    seen = {job: forward(model, images, options.device) for job, model in zip(jobs, models, strict=True)}
    found = {
        name: np.array([accuracy(seen[name, seed].emb_NSD) for seed in options.seeds])
        for name in options.networks
    }
    return {
        "conditions": CONDITIONS,
        "seeds": list(options.seeds),
        "steps": configured(options, "lgaf").steps,
        "operations": {
            name: operations(configured(options, name).backbone, size) for name in options.networks
        },
        "accuracy_RS": {name: figures[:, :, 0].tolist() for name, figures in found.items()},
        "tar_at_far_0.01_RS": {name: figures[:, :, 1].tolist() for name, figures in found.items()},
        "attention": attention([seen["lgaf", seed] for seed in options.seeds]),
        "local_weights": LOCAL_WEIGHTS,
        "tar_by_local_weight_RWS": [tar_by_weight(seen["lgaf", seed].unit_NSKD) for seed in options.seeds],
        "machine": {"processor": platform.processor() or platform.machine(), "torch": torch.__version__},
    }


def show(report: dict[str, Any]) -> None:
    kinds = ["none", *KINDS, "degraded"]
    for key, title in (("accuracy_RS", "1 - equal error rate"), ("tar_at_far_0.01_RS", "TAR at FAR 1 %")):
        print(f"\n{title}, percent; mean and deviation over {len(report['seeds'])} seeds\n")
        print("| network | MFLOP | " + " | ".join(kinds) + " |\n" + "| --- " * (2 + len(kinds)) + "|")
        for name, rows in report[key].items():
            cells = rows_by_kind(rows)
            shown = [f"{100 * np.mean(cells[k]):.2f} ± {100 * np.std(cells[k], ddof=1):.2f}" for k in kinds]
            print(f"| {name} | {report['operations'][name] / 1e6:.1f} | " + " | ".join(shown) + " |")
        ahead = np.subtract(*(rows_by_kind(report[key][name])["degraded"] for name in ("lgaf", "twin")))
        each = ", ".join(f"{100 * one:+.2f}" for one in ahead)
        print(f"\nlgaf ahead of its twin on degraded faces: {100 * ahead.mean():+.2f} (each seed: {each})")
    show_attention(report)


def show_attention(report: dict[str, Any]) -> None:
    """Print the attention, its correlation with the advantage, and the gain of the best constant weight."""
    print("\nlgaf's attention to the local branch, from sharp images to the strongest degradation,")
    print("and its change over this range for each seed:\n")
    weight_RS = np.array(report["attention"]["local_weight_RS"])
    for kind, columns in _columns().items():
        path_RS = weight_RS[:, np.array(columns) - 1]
        means = " ".join(f"{mean:.3f}" for mean in path_RS.mean(0))
        print(
            f"{kind:15s} {means}   "
            + ", ".join(f"{change:+.3f}" for change in path_RS[:, -1] - path_RS[:, 0])
        )
    print("\nIts correlation, among images of one strength, with how much better the local feature")
    print("separates identities than the global one; mean over the seeds, and each seed:\n")
    for kind, found in report["attention"]["weight_and_advantage_R"].items():
        print(f"{kind:15s} {np.mean(found):+.2f}   " + ", ".join(f"{one:+.2f}" for one in found))
    print(
        "\nlgaf's TAR at FAR 1 % with a constant weight and with the attention; the gain of the best weight"
    )
    print("for each kind over the attention (in brackets the weight, chosen for each seed by the others):\n")
    print("| kind | global | equal | local | attention | gain |\n" + "| --- " * 6 + "|")
    weights, own = report["local_weights"], report["tar_at_far_0.01_RS"]["lgaf"]
    own_R_by_kind = rows_by_kind(own)
    tar_W_by_kind = [rows_by_kind(rows) for rows in report["tar_by_local_weight_RWS"]]
    for kind in KINDS:
        tar_RW, own_R = np.array([one[kind] for one in tar_W_by_kind]), np.array(own_R_by_kind[kind])
        best_R, gain_R = gain_of_best(tar_RW, own_R)
        cells = [*(tar_RW[:, weights.index(w)].mean() for w in (0, 0.5, 1)), own_R.mean()]
        shown = " | ".join(f"{100 * cell:.1f}" for cell in cells)
        chosen = ", ".join(f"{weights[best]:.1f}" for best in best_R)
        spread = f"{100 * np.mean(gain_R):+.2f} ± {100 * np.std(gain_R, ddof=1):.2f}"
        print(f"| {kind} | {shown} | {spread} ({chosen}) |")


def gain_of_best(tar_RW: np.ndarray, own_R: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Return for each seed the best weight according to the other seeds, and its gain; needs two seeds."""
    best_R = [int(np.delete(tar_RW, r, axis=0).mean(0).argmax()) for r in range(len(tar_RW))]
    return best_R, tar_RW[np.arange(len(tar_RW)), best_R] - own_R


def rows_by_kind(rows: list[list[float]]) -> dict[str, list[float]]:
    """Return kind -> one figure per row; a row (of one seed or one weight) has a figure per condition."""
    each = [by_kind(np.array(row)) for row in rows]
    return {kind: [one[kind] for one in each] for kind in each[0]}


def page(report: dict[str, Any]) -> str:
    """Render norms and attention against strength, one chart per kind of degradation, as in the paper."""
    found = report["attention"]
    mean_SK, std_SK = (np.array(found[key]) for key in ("norm_mean_SK", "norm_std_SK"))
    weight_S = np.mean(found["local_weight_RS"], axis=0)
    norms, weights = [], []
    for number, (kind, columns) in enumerate(_columns().items()):
        rows = np.array(columns) - 1
        step_N = np.arange(len(rows))
        drawn: list[charts.Drawn] = []
        for k, name in ((GLOBAL, "global"), (LOCAL, "local")):
            low_N, high_N = mean_SK[rows, k] - std_SK[rows, k], mean_SK[rows, k] + std_SK[rows, k]
            drawn += [charts.Band(step_N, low_N, high_N, k), charts.Line(step_N, mean_SK[rows, k], name, k)]
        both = " / ".join(f"{one:+.2f}" for one in found["norm_and_strength"][kind])
        axes = charts.Axis(0, len(rows) - 1, step_N.tolist()), charts.Axis.round((-4, 2))
        norms.append(charts.chart(kind, drawn, *axes, x_title="strength", value=both))
        weights.append(charts.Line(step_N, weight_S[rows], kind, number))
    low, high = float(weight_S.min()), float(weight_S.max())
    axes = charts.Axis(0, 4, [0, 1, 2, 3, 4]), charts.Axis.round((low, high))
    attention = charts.chart("Attention to the local branch", weights, *axes, x_title="strength")
    body = report_page.section(
        "Feature norms",
        report_page.grid(norms, "thirds"),
        "Mean and deviation, standardised by sharp images; correlation of each norm with the strength.",
    ) + report_page.section("Attention", report_page.grid([attention], "halves"))
    together = f"norms of both branches: correlation {found['norms_of_both_branches']:+.2f}"
    return report_page.page("LGAF on degraded faces", together, body, kind="benchmark")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="folder for images and runs; it is kept")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path)
    parser.add_argument(
        "--large", action="store_true", help="R50 on 100,000 identities, rendered while training"
    )
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=NETWORKS,
        default=list(NETWORKS),
        help="lgaf and twin are always included",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--jobs", type=int, default=2, help="number of simultaneous trainings")
    parser.add_argument("--threads", type=int, default=1, help="threads of each training")
    parser.add_argument("--people", type=int, default=400, help="number of training identities")
    parser.add_argument("--test-people", type=int, default=120)
    parser.add_argument("--test-seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for lgaf train")
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    options.networks = [name for name in NETWORKS if name in ("lgaf", "twin", *options.networks)]
    options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.twin_width = twin_width(options)
    report = measure(options)
    show(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.page:
        options.page.write_text(page(report))


if __name__ == "__main__":
    main()
