"""Prometheus metrics of a run, and the HTTP server that exposes them. Only this file imports the client."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from http.server import ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, MetricsHandler

from data_pipeline.common.terminal import echo
from trainer.config import MetricsConfig

_STEP_BUCKETS_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_CHECKPOINT_BUCKETS_S = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
# Enough for several servers that scrape at once; each connection has a thread and a file descriptor.
_MAX_CONNECTIONS = 16
_REQUEST_S = 5.0


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


class _Server(ThreadingHTTPServer):
    """HTTP server of the metrics with a limit of connections, which take file descriptors from the training.

    Further connections are closed at once, or take the place of one that is older than `_REQUEST_S`.
    """

    allow_reuse_port = False
    request_queue_size = 64

    def __init__(self, config: MetricsConfig, registry: CollectorRegistry) -> None:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, *_, address = found[0]
        self._lock = threading.Lock()
        self._since_s: dict[Any, float] = {}
        handler = type("Handler", (MetricsHandler,), {"registry": registry, "timeout": _REQUEST_S})
        super().__init__((str(address[0]), config.port), handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            oldest = min(self._since_s, key=lambda one: self._since_s[one], default=None)
            is_full = len(self._since_s) >= _MAX_CONNECTIONS
            if is_full and oldest and time.monotonic() - self._since_s[oldest] > _REQUEST_S:
                # Its thread, which waits for the client, returns.
                self._since_s.pop(oldest)
                with contextlib.suppress(OSError):  # the client has closed it
                    oldest.shutdown(socket.SHUT_RDWR)
                is_full = False
            if not is_full:
                self._since_s[request] = time.monotonic()
        if is_full:
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._since_s.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore the errors of a connection, such as one that the client has closed."""


def serve(metrics: Metrics, config: MetricsConfig) -> None:
    """Serve the metrics from a thread of this process, and print the address.

    If the port is in use, that is reported and the run continues without the server.
    """
    try:
        server = _Server(config, metrics.registry)
    except OSError as error:
        text = f"not served: {config.host}:{config.port}: {error.strerror or error}; set metrics.port"
    else:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        text = f"at http://{config.host}:{server.server_port}/metrics"
    echo(f"lgaf: metrics {text}", err=True)
