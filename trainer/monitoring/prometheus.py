"""What Prometheus sees of a run. The only import of prometheus_client."""

from __future__ import annotations

import sys

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from trainer.config import MetricsConfig

_STEP_BUCKETS_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_CHECKPOINT_BUCKETS_S = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Metrics:
    """The metrics of one process, in `registry` or one of their own; times in seconds."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry = registry or CollectorRegistry()
        self._steps = Counter("lgaf_steps", "Training steps done by this process", registry=registry)
        self._skipped = Counter(
            "lgaf_skipped_steps",
            "Steps skipped by all ranks, as a loss or gradient was not finite",
            registry=registry,
        )
        self.rollbacks = Counter(
            "lgaf_rollbacks",
            "Times the run went back to a checkpoint, after skipped steps",
            registry=registry,
        )
        self._samples = Counter("lgaf_samples", "Images trained on, over all ranks", registry=registry)
        self._step = Gauge("lgaf_step", "Number of steps the run has done", registry=registry)
        self._loss = Gauge("lgaf_loss", "Mean loss over all ranks, as last looked at", registry=registry)
        self._rate = Gauge("lgaf_learning_rate", "Learning rate of the last step", registry=registry)
        self._speed = Gauge("lgaf_samples_per_second", "Images per second, over all ranks", registry=registry)
        self._wait = Counter(
            "lgaf_data_wait_seconds", "Time this process waited for decoded images", registry=registry
        )
        self._bad = Gauge(
            "lgaf_bad_records", "Records that could not be read or decoded, of all ranks", registry=registry
        )
        self._step_s = Histogram(
            "lgaf_step_seconds", "Duration of a training step", registry=registry, buckets=_STEP_BUCKETS_S
        )
        self.checkpoint_s = Histogram(
            "lgaf_checkpoint_seconds",
            "Duration of writing a checkpoint, beside the training",
            registry=registry,
            buckets=_CHECKPOINT_BUCKETS_S,
        )
        self.failed_checkpoints = Counter(
            "lgaf_failed_checkpoints", "Checkpoints that could not be written", registry=registry
        )
        self._evaluation = Gauge(
            "lgaf_evaluation",
            "Figures of the last evaluation; rates from 0 to 1",
            ["protocol", "task", "figure"],
            registry=registry,
        )

    def step_done(self, steps: int, samples: int, learning_rate: float, step_s: float) -> None:
        """Count a step of `samples` images, after which the run has done `steps`."""
        self._steps.inc()
        self._samples.inc(samples)
        self._step.set(steps)
        self._rate.set(learning_rate)
        self._step_s.observe(step_s)

    def step_skipped(self) -> None:
        """Count a step, already counted as done, that moved nothing."""
        self._skipped.inc()

    def evaluated(self, protocol: str, task: str, figures: dict[str, float]) -> None:
        """Take over what an evaluation has found."""
        for figure, value in figures.items():
            self._evaluation.labels(protocol, task, figure).set(value)

    def looked(self, loss: float, samples_per_s: float, data_wait_s: float, bad_records: int) -> None:
        """Take over what was seen when the losses were last fetched."""
        self._loss.set(loss)
        self._speed.set(samples_per_s)
        self._wait.inc(data_wait_s)
        self._bad.set(bad_records)


def serve(metrics: Metrics, config: MetricsConfig) -> None:
    """Serve the metrics from a thread of this process, and say where.

    A port that is taken is reported and the run goes on: it matters more than being watched.
    """
    try:
        server, _ = start_http_server(config.port, config.host, metrics.registry)
    except OSError as error:
        text = f"not served: {config.host}:{config.port}: {error.strerror or error}; set metrics.port"
    else:
        text = f"at http://{config.host}:{server.server_port}/metrics"
    print(f"lgaf: metrics {text}", file=sys.stderr, flush=True)
