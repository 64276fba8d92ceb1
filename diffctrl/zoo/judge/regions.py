"""Connected regions of boolean pictures, without scipy. Every mask is (H, W) bool."""

import numpy as np

Array = np.ndarray


def despeckled(mask: Array) -> Array:
    """Without pixels that fewer than 3 of their 8 neighbours share: specks go, corners stay."""
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


def label(mask: Array, *, diagonal: bool) -> tuple[Array, int]:
    """Number the connected regions 1..n (0 outside) by union-find over rows; `diagonal` joins corners."""
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, columns = np.nonzero(edges)
    runs = list(zip(rows[::2].tolist(), columns[::2].tolist(), columns[1::2].tolist(), strict=True))
    parent = list(range(len(runs)))
    reach = 1 if diagonal else 0

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    above, current, at = range(0), range(0), -2
    for index, (y, start, stop) in enumerate(runs):
        if y != at:
            above, current, at = (current if y == at + 1 else range(0)), range(index, index), y
        current = range(current.start, index + 1)
        for other in above:
            if runs[other][1] < stop + reach and start < runs[other][2] + reach:
                parent[root(other)] = root(index)
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


def window(mask: Array) -> tuple[slice, slice]:
    """The smallest rectangle that holds a mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return slice(0, 0), slice(0, 0)
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def filled(mask: Array) -> Array:
    """The mask with its holes: everything that the outside cannot reach."""
    box = window(mask)
    labels, _ = label(np.pad(~mask[box], 1, constant_values=True), diagonal=False)
    out = np.zeros_like(mask)
    out[box] = (labels != labels[0, 0])[1:-1, 1:-1]
    return out


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
