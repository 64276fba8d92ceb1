"""What the requests of all commands share: methods with their settings, device and precision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from diffctrl import methods, settings
from diffctrl.drawing.recipe import ControlSpec
from diffctrl.errors import BadRequestError

if TYPE_CHECKING:
    from diffctrl.softpag.headset import HeadSet

STOCK = "none"
_DTYPES = ("float32", "bfloat16", "float16")


def first(*values: Any) -> Any:
    """The first value that is not None."""
    return next((value for value in values if value is not None), None)


def read_controls(
    names: tuple[str, ...] | None,
    pairs: Iterable[tuple[str, str]],
    recorded: Iterable[ControlSpec] = (),
    *,
    same_model: bool = True,
) -> tuple[ControlSpec, ...]:
    """The methods with all of their settings; a recipe's settings stay unless its method is left out.

    Args:
        names: of the methods in order, "none" alone for the stock model; None for those of the recipe.
        pairs: (name, text) of settings; the name is "option" or "method.option".
        recorded: the recipe's.
        same_model: the model is the recipe's.

    Raises:
        BadRequestError: a method or option is unknown, or a value is out of range.
    """
    before = {spec.method: spec.settings for spec in recorded}
    pairs = tuple(pairs)
    names = tuple(before) if names is None else names
    if STOCK in names:
        if len(names) > 1:
            raise BadRequestError(f"--method {STOCK} is the stock model and cannot be combined with {names}")
        names = ()
    found = {name: methods.find(name) for name in names}
    if pairs and not found:
        raise BadRequestError(
            f"--set {pairs[0][0]} has no method to go to; add --method, one of "
            f"{', '.join(sorted(methods.METHODS))}"
        )
    classes = {name: method.config_class() for name, method in found.items()}
    owned = [(*_owner(key, classes), text) for key, text in pairs]
    given = {}
    for name in found:
        said = {option: text for owner, option, text in owned if owner == name}
        given[name] = _kept(before.get(name, {}), said, same_model)
    # A head set brings its u and w along; what is said beside it goes before them, in any order.
    for name, option, text in sorted(owned, key=lambda each: not is_head_set(*each[1:])):
        given[name] |= _of_head_set(text) if is_head_set(option, text) else {option: text}
    return tuple(
        ControlSpec(method=name, settings=settings.as_plain(settings.parse(classes[name], values, of=name)))
        for name, values in given.items()
    )


def _kept(recorded: Mapping[str, Any], said: Mapping[str, str], same_model: bool) -> dict[str, Any]:
    """A recipe's settings, without the u and w of a head set that is not used again.

    A recipe holds numbers also where they came with a shipped set; other heads bring their own.
    """
    changes = not same_model or not said.keys().isdisjoint(("heads", "kind"))
    if "heads" not in recorded or not changes:
        return dict(recorded)
    if not _are_of_a_set(recorded["heads"]) and not _are_of_a_set(said.get("heads", "")):
        return dict(recorded)
    return {name: value for name, value in recorded.items() if name not in ("u", "w")}


def _are_of_a_set(heads: str | None) -> bool:
    """Whether heads are those of a set: a shipped one, by its name or as the default, or one in a file."""
    from diffctrl.softpag import library

    return heads is None or library.is_name(heads) or is_head_set("heads", heads)


def is_head_set(option: str, text: str) -> bool:
    """Whether a setting names a file of `diffctrl headhunt`, as in heads=heads.json."""
    return option.rpartition(".")[2] == "heads" and text.endswith(".json")


def _of_head_set(path: str) -> dict[str, Any]:
    """The settings that a file of `diffctrl headhunt` brings along: its heads, its u and its w."""
    found = read_head_set(path)
    return {"heads": str(found)} | {
        name: value for name, value in (("u", found.u), ("w", found.w)) if value is not None
    }


def read_head_set(path: str) -> HeadSet:
    """The head set in a file; recipes hold its heads, not the file's name.

    Raises:
        BadRequestError: it cannot be read.
    """
    from diffctrl.softpag.headset import HeadSet

    try:
        found = HeadSet.load(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadRequestError(f"--set heads={path} cannot be read ({reason})") from None
    if not len(found):
        raise BadRequestError(
            f"--set heads={path} is empty: its search found no head that does better than no guidance, and "
            "nothing would be perturbed; search with another u or w, or name heads as in heads=L3H1,L4"
        )
    return found


def _owner(key: str, classes: Mapping[str, type]) -> tuple[str, str]:
    """(method, option) that `--set key=...` means."""
    method, dot, option = key.partition(".")
    if dot:
        if method not in classes:
            raise BadRequestError(f"--set {key} names the method {method!r}; in use: {', '.join(classes)}")
        return method, option
    owners = [name for name, kind in classes.items() if key in settings.field_types(kind)]
    if len(owners) > 1:
        raise BadRequestError(f"--set {key} fits {' and '.join(owners)}; write {owners[0]}.{key}")
    return (owners or list(classes))[0], key  # an unknown option is named by the method's own check


def choose_device(wanted: str | None, dtype: str | None, *, small: bool) -> tuple[str, str]:
    """(device, dtype), as asked for, else the GPU where there is one.

    Args:
        small: the model is one of the package's own, for which a CPU will do.

    Raises:
        BadRequestError: this machine has no such device, or there is no such dtype.
    """
    import torch

    cuda = torch.cuda.is_available()
    if wanted is None:
        wanted = "cuda" if cuda and not small else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise BadRequestError(f"--device {wanted} is no device of torch; write cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not cuda):
        raise BadRequestError(f"there is no device {wanted} on this machine; write --device cpu")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise BadRequestError(f"there is no device {wanted}: this machine has {torch.cuda.device_count()}")
    stock = "float32" if device.type == "cpu" else "bfloat16"
    dtype = first(dtype, stock)
    if dtype not in _DTYPES:
        raise BadRequestError(f"--dtype {dtype} is not one of {', '.join(_DTYPES)}")
    return str(device), dtype


def processors(controls: tuple[ControlSpec, ...]) -> list[Any]:
    """The processors of a plan's controls."""
    return [methods.METHODS[spec.method].build(spec.settings) for spec in controls]
