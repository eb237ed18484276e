"""Streaming safetensors load: one tensor at a time from the file into its parameter's slice.

Everything about names and shapes is checked from the files' headers before the first byte of
weights is read, so a checkpoint that does not fit is refused at once and in full.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from mm_core.checkpoint.config import LoadedCheckpoint
from mm_core.checkpoint.files import TensorInfo, damaged, find_tensors, listed
from mm_core.checkpoint.names import FLOATING, NameTable, Placement, Plan, Target, make_plan, tie
from mm_core.checkpoint.staging import copy_staged, stageable
from mm_core.errors import CheckpointError, OutOfMemoryError

if TYPE_CHECKING:
    from torch import Tensor


def load_weights(checkpoint: LoadedCheckpoint, targets: Sequence[Target], *, show_progress: bool = True) -> None:
    """Fill the parameters of every target module from the checkpoint's safetensors files.

    Tensors are cast to the parameters' dtype. Raises one CheckpointError that lists all missing
    parameters, unexpected tensors, and tensors of a wrong shape or kind; another one names
    weights that are NaN or infinite.
    """
    tensors = find_tensors(checkpoint.name, checkpoint.path, checkpoint.parts)
    tables = [NameTable(module, weight_map) for module, weight_map in targets]
    plan = make_plan(tensors, tables)
    _refuse_misfits(checkpoint.name, tensors, plan)
    _copy_all(checkpoint.name, tensors, plan, show_progress)
    for module, weight_map in targets:
        tie(module, weight_map)


def _refuse_misfits(name: str, tensors: Mapping[str, TensorInfo], plan: Plan) -> None:
    shapes, kinds = [], []
    for tensor, placements in plan.placements.items():
        info = tensors[tensor]
        for placement in placements:
            if info.shape != (want := placement.wanted_shape()):
                shapes.append(f"{tensor} {list(info.shape)} for {_label(placement)} {list(want)}")
            if placement.param.is_floating_point() and info.dtype not in FLOATING:
                kinds.append(f"{tensor} ({info.dtype})")
    faults = []
    for what, names in (
        ("parameters are missing", plan.missing),
        ("tensors are unexpected", sorted(plan.unexpected)),
        ("tensors have a wrong shape", sorted(shapes)),
        ("tensors are quantised or integers where floating weights are wanted", sorted(kinds)),
    ):
        if names:
            faults.append(f"{len(names)} {what}: {listed(names)}")
    if faults:
        raise CheckpointError(
            f"The weights of '{name}' do not fit the model: {'; '.join(faults)}. Check that config.json and the "
            "weights belong together and that the files are complete; nothing was loaded."
        )


def _label(placement: Placement) -> str:
    return placement.name if placement.shard is None else f"{placement.name} (shard {placement.shard})"


def _copy_all(name: str, tensors: Mapping[str, TensorInfo], plan: Plan, show_progress: bool) -> None:
    staged = {tensor for tensor, places in plan.placements.items() if stageable(tensors[tensor], places)}
    by_file: dict[Path, list[TensorInfo]] = defaultdict(list)
    for tensor in plan.placements:
        if tensor not in staged:
            by_file[tensors[tensor].file].append(tensors[tensor])
    flags: list[tuple[str, Tensor]] = []
    total = sum(tensors[tensor].nbytes for tensor in plan.placements)
    # delay: a load that takes less than a second shows no bar.
    bar = tqdm(
        total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="Loading weights", delay=1.0,
        disable=not show_progress,
    )  # fmt: skip
    with bar:
        for device in {plan.placements[tensor][0].param.device for tensor in staged}:
            mine = [tensor for tensor in staged if plan.placements[tensor][0].param.device == device]
            copy_staged([tensors[tensor] for tensor in mine], plan.placements, device, bar.update)
            flags += [(tensor, flag) for tensor in mine for flag in _finite_flags(plan.placements[tensor])]
        for file in sorted(by_file):
            for tensor, value in _read(file, by_file[file]):
                flags += [(tensor, flag) for flag in _place(tensor, value, plan.placements[tensor])]
                bar.update(tensors[tensor].nbytes)
    _refuse_nonfinite(name, flags)


def _read(file: Path, infos: Sequence[TensorInfo]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of one file, in file order, each read when it is asked for."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt", device="cpu") as stream:
            for info in infos:
                yield info.name, stream.get_tensor(info.stored_name)
    except SafetensorError as error:
        raise damaged(file, str(error)) from error
    except OSError as error:
        raise CheckpointError(f"'{file}' cannot be read ({error.strerror}). Check its permissions.") from error


def _place(name: str, value: Tensor, placements: Sequence[Placement]) -> Iterator[Tensor]:
    """Copy into every place of a tensor; yields, for each, whether what arrived is finite."""
    import torch

    for placement in placements:
        view = placement.view()
        try:
            with torch.no_grad():
                view.copy_(value.reshape(view.shape))
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(f"No memory for tensor '{name}' on {view.device}. Use a smaller dtype.") from error
    yield from _finite_flags(placements)


def _finite_flags(placements: Sequence[Placement]) -> Iterator[Tensor]:
    """For each place of a tensor, whether what arrived is finite."""
    for placement in placements:
        view = placement.view()
        if view.is_floating_point() and view.numel():
            yield _is_finite(view)


def _is_finite(view: Tensor) -> Tensor:
    """Whether all values are finite, as a tensor on the device: nothing waits for it here.

    NaN and infinity survive minimum and maximum, which need one pass and no temporary. Checked
    after the cast: a float32 weight that overflows float16 counts, too.
    """
    low, high = view.aminmax()
    finite: Any = low.isfinite() & high.isfinite()
    return finite  # type: ignore[no-any-return]


def _refuse_nonfinite(name: str, flags: Sequence[tuple[str, Tensor]]) -> None:
    import torch

    bad: list[str] = []
    for device in {flag.device for _, flag in flags}:
        mine = [(tensor, flag) for tensor, flag in flags if flag.device == device]
        finite = torch.stack([flag for _, flag in mine]).tolist()
        bad += [tensor for (tensor, _), ok in zip(mine, finite, strict=True) if not ok]
    if bad:
        bad = sorted(set(bad))
        raise CheckpointError(
            f"{len(bad)} tensors of '{name}' are NaN or infinite (in the dtype they are loaded to): {listed(bad)}. "
            "Fetch the files again; if they are meant so, dtype='float32' or 'bfloat16' has the wider range."
        )
