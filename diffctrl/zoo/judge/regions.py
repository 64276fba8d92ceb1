"""Connected regions of boolean pictures, without scipy. Every mask is (H, W) bool."""

import numpy as np

Array = np.ndarray


def despeckled(mask: Array) -> Array:
    """Without the pixels that fewer than 3 of their 8 neighbours share: specks and whiskers go, corners stay."""
    padded = np.pad(mask.astype(np.int8), 1)
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return mask & (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] >= 4)


def grow(mask: Array, pixels: int = 1) -> Array:
    """Dilate by 4-neighbours `pixels` times."""
    for _ in range(pixels):
        out = mask.copy()
        out[1:] |= mask[:-1]
        out[:-1] |= mask[1:]
        out[:, 1:] |= mask[:, :-1]
        out[:, :-1] |= mask[:, 1:]
        mask = out
    return mask


def shrink(mask: Array, pixels: int = 1) -> Array:
    """Erode by 4-neighbours `pixels` times; the frame counts as inside."""
    return ~grow(~mask, pixels)


def _runs(row: Array) -> tuple[list[int], list[int]]:
    change = np.flatnonzero(np.diff(np.concatenate(([0], row.view(np.int8), [0]))))
    return change[::2].tolist(), change[1::2].tolist()


def label(mask: Array, *, diagonal: bool) -> tuple[Array, int]:
    """Number the connected regions 1..n (0 outside); `diagonal` joins corners. Union-find over horizontal runs."""
    parent: list[int] = []
    runs: list[tuple[int, int, int]] = []
    reach = 1 if diagonal else 0
    previous: list[int] = []

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for y in range(mask.shape[0]):
        current = []
        for start, stop in zip(*_runs(mask[y]), strict=True):
            index = len(runs)
            runs.append((y, start, stop))
            parent.append(index)
            for other in previous:
                if runs[other][1] < stop + reach and start < runs[other][2] + reach:
                    parent[root(other)] = root(index)
            current.append(index)
        previous = current
    out = np.zeros(mask.shape, dtype=np.int32)
    numbers: dict[int, int] = {}
    for index, (y, start, stop) in enumerate(runs):
        out[y, start:stop] = numbers.setdefault(root(index), len(numbers) + 1)
    return out, len(numbers)


def regions(mask: Array, smallest: int) -> list[Array]:
    """The 8-connected regions of at least `smallest` pixels, largest first."""
    labels, count = label(mask, diagonal=True)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    order = sorted((i for i in range(1, count + 1) if sizes[i] >= smallest), key=lambda i: -sizes[i])
    return [labels == index for index in order]


def filled(mask: Array) -> Array:
    """The mask with its holes: everything that the outside cannot reach."""
    labels, _ = label(np.pad(~mask, 1, constant_values=True), diagonal=False)
    return (labels != labels[0, 0])[1:-1, 1:-1]


def spread(labels: Array, inside: Array) -> Array:
    """Give unlabelled pixels (0) of `inside` the label of a nearest labelled neighbour, ring by ring."""
    out = np.where(inside, labels, 0)
    while True:
        open_ = inside & (out == 0)
        padded = np.pad(out, 1)
        neighbour = np.maximum.reduce(
            [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
        )
        take = open_ & (neighbour > 0)
        if not take.any():
            return out
        out[take] = neighbour[take]
