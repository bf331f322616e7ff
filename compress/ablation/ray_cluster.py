"""Joins a Ray cluster, or starts one on this machine while it is needed; computes what its workers need."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from ...registry import PrunekitError, SpecError
from ..models.loading import reason_of

OBJECT_STORE = 100 * 2**20
"""Bytes of a local cluster's object store: only pipelines and their results pass through it."""

REACH = 5.0
"""Seconds within which a cluster's address must answer; Ray itself would try for minutes."""

QUIET = {"RAY_DEDUP_LOGS_SKIP_REGEX": ".", "RAY_SCHEDULER_EVENTS": "0", "RAY_USAGE_STATS_ENABLED": "0"}
"""Environment that keeps Ray's own lines off the terminal, where the progress of the study is shown."""


@dataclass(frozen=True)
class Demand:
    """How many workers a study asks for, what each of them needs, and for how many there is room now."""

    workers: int
    cpus: int
    gpus: int
    room: int

    @property
    def label(self) -> str:
        """The demand in words."""
        need = f"{self.gpus} GPU" if self.gpus else f"{self.cpus} CPU{'s' if self.cpus > 1 else ''}"
        return f"{self.workers} worker{'s' if self.workers > 1 else ''} with {need} each"


@contextmanager
def connected(address: str | None, workers: int | None) -> Iterator[tuple[Any, bool]]:
    """The module ``ray``, connected for the length of the block, and whether the cluster was started here.

    A connection that the process has already is used and left as it is. Else it joins the cluster at ``address``
    or ``RAY_ADDRESS`` (``auto``: the one that runs on this machine), or starts one here, with CPUs for ``workers``,
    and stops it afterwards. Raises :class:`SpecError` where Ray is not installed or nothing answers at the address,
    and :class:`PrunekitError` where no cluster can be joined or started.
    """
    ray = _module()
    if ray.is_initialized():
        yield ray, False
        return
    address, place = _where(address)
    try:
        _connect(ray, address, place, workers)
        yield ray, address is None
    finally:
        ray.shutdown()


def _module() -> Any:
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise SpecError(
            f"--engine ray: Ray cannot be imported ({reason_of(error)}); pip install ray, "
            "or leave --engine out to run the trials one by one"
        ) from None
    return ray


def _where(address: str | None) -> tuple[str | None, str]:
    """The cluster's address (``None``: start one here), and its name in messages.

    As in Ray, ``RAY_ADDRESS`` defines ``auto``.
    """
    variable = os.environ.get("RAY_ADDRESS")
    chosen, place = address or None, f"--address {address}"
    if variable and chosen in (None, "auto"):
        chosen, place = variable, f"RAY_ADDRESS={variable}"
    return (None if chosen == "local" else chosen), place


def _reach(ray: Any, address: str, place: str) -> None:
    """Raise :class:`SpecError` where nothing answers at ``HOST:PORT``; an address without a port is not checked.

    ``auto`` may be a cluster that Ray remembers but that has died.
    """
    source = place.replace("=", " ").split()[0]
    if address == "auto":
        # No public function has it. If this one is gone, or finds nothing, ray.init reports it.
        with suppress(Exception):
            from ray._private.services import get_ray_address_from_environment

            logging.getLogger("ray").setLevel(logging.ERROR)
            address = get_ray_address_from_environment("auto", None)
            place += f" ({address})"
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        return
    host = host.strip("[]")
    hosts = [host]
    if host == "localhost" or host.startswith("127."):
        hosts.append(ray.util.get_node_ip_address())  # Ray replaces it by this
    for host in hosts:
        try:
            socket.create_connection((host, int(port)), timeout=REACH).close()
            return
        except (OSError, OverflowError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
    raise SpecError(
        f"{place}: nothing answers there ({reason}); start Ray with ray start --head and name the HOST:PORT that it "
        f"prints, or leave {source} out to have Ray started for this study"
    )


def _connect(ray: Any, address: str | None, place: str, workers: int | None) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is not None and "://" in address:
        raise SpecError(
            f"{place}: Ray Client addresses are not supported; run prunekit on a machine of the cluster "
            "with --address auto, or name its HOST:PORT"
        )
    if address is None:
        cpus = None if workers is None else max(os.cpu_count() or 1, workers)
        # "local", because Ray would join whatever cluster it finds if no address were given.
        options.update(address="local", num_cpus=cpus, include_dashboard=False, object_store_memory=OBJECT_STORE)
    else:
        _reach(ray, address, place)
        options.update(address=address)
    main = threading.current_thread() is threading.main_thread()
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            ray.init(**options)
    except Exception as error:  # of sockets, processes, versions or configuration: Ray has no class for them
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if address is None:
            raise PrunekitError(
                f"--engine ray: no Ray can be started on this machine ({reason}); start one with ray start --head and "
                "give --address auto, or leave --engine out"
            ) from None
        raise PrunekitError(
            f"{place}: no Ray cluster can be joined there ({reason}); start one with ray start --head, "
            "set RAY_AUTH_MODE=token if it asks for a token, or leave --address and RAY_ADDRESS out to have one "
            "started for this study"
        ) from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, terminate)  # Ray replaces our handler by its own


def demand(ray: Any, devices: Collection[str], workers: int | None, threads: int, trials: int) -> Demand:
    """The workers to ask for, for a study whose trials name ``devices`` and compute on ``threads`` threads.

    One GPU for a worker where trials ask for one (``cuda``, or ``auto`` while the cluster has any), else a CPU for
    every thread; fewer CPUs where ``workers`` would not fit otherwise. As many workers as there are GPUs, or as have
    CPUs for all their threads, unless ``workers`` is set; never more than trials. Raises :class:`SpecError` for a
    numbered GPU.
    """
    numbered = sorted(device for device in devices if device.startswith("cuda:"))
    if numbered:
        raise SpecError(
            f"model.device: {numbered[0]} names one GPU of one machine, but under --engine ray every worker is given "
            "one of its own; set model.device: cuda"
        )
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]

    def room(resource: str, each: int) -> int:
        return sum(int(machine.get(resource, 0) // each) for machine in machines)

    if "cuda" in devices or ("auto" in devices and room("GPU", 1)):
        gpus = room("GPU", 1)
        return Demand(min(workers or gpus or 1, trials), cpus=0, gpus=1, room=gpus)
    wanted = min(workers or room("CPU", threads) or 1, trials)
    cpus = next((each for each in range(threads, 1, -1) if room("CPU", each) >= wanted), 1)
    return Demand(wanted, cpus=cpus, gpus=0, room=room("CPU", cpus))


def resources(ray: Any) -> str:
    """The total and the free resources of the cluster, in words."""
    total, free = ray.cluster_resources(), ray.available_resources()
    machines = sum(bool(node["Alive"]) for node in ray.nodes())
    counts = ", ".join(f"{kind} {total.get(kind, 0):g} ({free.get(kind, 0):g} free)" for kind in ("GPU", "CPU"))
    return f"{counts} on {machines} machine{'s' if machines != 1 else ''}"
