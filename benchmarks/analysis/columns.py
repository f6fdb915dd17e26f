"""The tables of the benchmarks, on a terminal and in a report: for each question the columns of its rows."""

from __future__ import annotations

from benchmarks.analysis.limits import RTX_4090
from benchmarks.harness.tables import Columns, megabytes, percent, seconds, times, yes

GEMM = ("vs. PyTorch's GEMM rate", percent)
TIME = ("p50", seconds)
MOST = ("p95", seconds)

ROOFLINE: Columns = {
    "stage": "stage",
    "compute_s": ("arithmetic", seconds),
    "memory_s": ("memory", seconds),
    "floor_s": ("at best", seconds),
    "bound": "bound by",
}
LATENCY: dict[str, tuple[str, Columns]] = {
    "end_to_end": (
        "How long does an image take? Control image in host memory → RGB in host memory, guided",
        {
            "candidate": "candidate",
            "batch": "batch",
            "p50": TIME,
            "p95": MOST,
            "images_per_s": "images/s",
            "speedup": ("vs. loop, fp32", times),
            "speedup_bf16": ("vs. loop, bf16", times),
            "batch_gain": ("images/s, vs. first batch", times),
            "tokens_equal": ("tokens equal", percent),
            "of_limit": GEMM,
        },
    ),
    "stage": (
        "Where does it go?",
        {
            "candidate": "candidate",
            "batch": "batch",
            "stage": "stage",
            "p50": TIME,
            "p95": MOST,
            "share": ("share", percent),
            "gflop": "GFLOP",
            "limit_s": ("at PyTorch's rates", seconds),
            "bound": "bound by",
            "of_limit": GEMM,
        },
    ),
    "next_seed": (
        "What does a further seed on the same control and class cost?",
        {
            "candidate": "candidate",
            "p50": TIME,
            "ratio": ("vs. a new control's", percent),
            "control_p50": ("control", seconds),
            "condition_p50": ("condition", seconds),
        },
    ),
    "start": (
        "What do starting and memory cost? Each in a process of its own",
        {
            "candidate": "candidate",
            "import_s": ("import", seconds),
            "open_s": ("open", seconds),
            "first_image_s": ("first image", seconds),
            "cold_start_s": ("car-run, start to PNG", seconds),
            "peak_rss": ("peak memory, MB", megabytes),
            "rss_less_weights": ("less the weights, MB", megabytes),
            "plan_bytes": ("plan, MB", megabytes),
        },
    ),
    "limit": (
        "What are PyTorch's rates on this machine? At this image's sizes",
        {
            "dtype": "type",
            "threads": "threads",
            "gemm_gflops": "GFLOP/s",
            "gemm_gflops_best": "best size, GFLOP/s",
            "memory_gbs": "memory, GB/s",
        },
    ),
    "roofline": (f"What could a GPU do at best? {RTX_4090.name}: computed from the counts, not measured", ROOFLINE),
}
"""Question → heading and columns."""

RATIOS: Columns = {
    "method": "method",
    "steps": "steps",
    "size": ("their pixels", lambda size: f"{size}²"),
    "tier": "tier",
    "precision": "precision",
    "candidate": "ours",
    "against": "theirs",
    "times_ours": ("times as long as ours", times),
    "p10": "p10",
    "p90": "p90",
    "scaled": ("scaled", yes),
}
THEIRS: Columns = {
    "candidate": "candidate",
    "tier": "tier",
    "precision": "precision",
    "size": ("pixels", lambda size: f"{size}²"),
    "steps": "steps",
    "timed_steps": "timed",
    "p50": TIME,
    "p95": MOST,
    "text_s": ("text", seconds),
    "control_s": ("control", seconds),
    "step_s": ("a step", seconds),
    "decode_s": ("decoder", seconds),
    "gflop": "GFLOP",
}

SCHEDULE_TIMES: Columns = {
    "schedule": "schedule",
    "flags": ("flags", lambda flags: f"`{flags}`" if flags else ""),
    "p50": TIME,
    "ratio": ("vs. exact's time", percent),
    "loop_p50": ("loop", seconds),
    "loop_ratio": ("vs. exact's loop", percent),
}
SCHEDULE_CHANGES: Columns = {
    "schedule": "schedule",
    "tokens_equal": ("tokens equal", percent),
    "kid_half": "KID of halves",
    "kid_half_std": "±",
    "precision": "precision",
    "recall": "recall",
    "f1": "control F1",
    "f1_change": "F1, change",
    "f1_change_error": "± standard error",
    "images": "images",
}
SCALES: Columns = {
    "scale": "scale",
    "side": "side",
    "guided_p50": ("guided", seconds),
    "unguided_p50": ("unguided", seconds),
    "ratio": ("unguided vs. guided", percent),
}

TRAINING: Columns = {
    "stage": "stage",
    "variant": "step",
    "step_p50": TIME,
    "images_per_s": "images/s",
    "speedup": ("vs. plain", times),
    "speedup_p10": "p10",
    "speedup_p90": "p90",
    "peak_rss": ("peak memory, MB", megabytes),
}
