"""Prometheus metrics of a run, and the HTTP server that exposes them. Only this file imports the client."""

from __future__ import annotations

import sys

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from trainer.config import MetricsConfig

_STEP_BUCKETS_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_CHECKPOINT_BUCKETS_S = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Metrics:
    """The metrics of one process, in `registry` or a new one; times are in seconds."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry = registry or CollectorRegistry()
        self._steps = Counter("lgaf_steps", "Training steps completed by this process", registry=registry)
        self._skipped = Counter(
            "lgaf_skipped_steps",
            "Steps skipped on all ranks because of a non-finite loss or gradient",
            registry=registry,
        )
        self.rollbacks = Counter(
            "lgaf_rollbacks",
            "Times the run returned to a checkpoint after skipped steps",
            registry=registry,
        )
        self._samples = Counter("lgaf_samples", "Images trained on, over all ranks", registry=registry)
        self._step = Gauge("lgaf_step", "Number of completed steps of the run", registry=registry)
        self._loss = Gauge("lgaf_loss", "Mean loss over all ranks, as last logged", registry=registry)
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
            "Duration of writing a checkpoint in the background",
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
        """Count a step of `samples` images, the run's step number `steps`."""
        self._steps.inc()
        self._samples.inc(samples)
        self._step.set(steps)
        self._rate.set(learning_rate)
        self._step_s.observe(step_s)

    def step_skipped(self) -> None:
        """Count a step, already counted as done, that updated no weight."""
        self._skipped.inc()

    def evaluated(self, protocol: str, task: str, figures: dict[str, float]) -> None:
        """Set the figures of one task of an evaluation."""
        for figure, value in figures.items():
            self._evaluation.labels(protocol, task, figure).set(value)

    def logged(self, loss: float, samples_per_s: float, data_wait_s: float, bad_records: int) -> None:
        """Set the figures of the steps since the last log, and add their time of waiting for data."""
        self._loss.set(loss)
        self._speed.set(samples_per_s)
        self._wait.inc(data_wait_s)
        self._bad.set(bad_records)


def serve(metrics: Metrics, config: MetricsConfig) -> None:
    """Serve the metrics from a thread of this process, and print the address.

    If the port is in use, that is reported and the run continues without the server.
    """
    try:
        server, _ = start_http_server(config.port, config.host, metrics.registry)
    except OSError as error:
        text = f"not served: {config.host}:{config.port}: {error.strerror or error}; set metrics.port"
    else:
        text = f"at http://{config.host}:{server.server_port}/metrics"
    print(f"lgaf: metrics {text}", file=sys.stderr, flush=True)
