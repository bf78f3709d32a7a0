"""Definition of polygon rasterisation: COCO's rule (`rleFrPoly` of cocoapi's maskApi.c), over all edges at once.

That rule walks the outline, scaled by 5, in unit steps. Where the walk crosses from sub-pixel 5x + 2 to 5x + 3, it
toggles column x of the mask from some row downwards. An edge crosses a column at most once, so the mask is a running
sum, modulo 2, of toggles that each edge finds by itself. Float64 throughout: float32 slopes move pixels in one polygon
of a hundred.
"""

import torch
from torch import Tensor

UPSAMPLING = 5
MIN_SIDE = 0.1  # of the box, in pixels: detectron2's guard against a division by zero
BLOCK = 1 << 21  # numbers per intermediate


def rasterize_polygons(
    edges: Tensor, parts: Tensor, num_parts: int, boxes: Tensor, matched: Tensor, side: int
) -> Tensor:
    """edges [B, G, E, 4], parts [B, G, E], boxes [B, R, 4], matched int64 [B, R] -> float32 [B, R, side, side]."""
    batch, slots, per_slot, _ = edges.shape
    regions = boxes.shape[1]
    if batch * regions * slots * per_slot * side * num_parts == 0:
        return boxes.new_zeros((batch, regions, side, side), dtype=torch.float32)
    slot = (matched.clamp(min=0) + torch.arange(batch, device=matched.device)[:, None] * slots).flatten()  # [B·R]
    edges, parts = edges.flatten(0, 1), parts.flatten(0, 1)
    boxes, present = boxes.flatten(0, 1), (matched >= 0).flatten()
    chunk = max(1, BLOCK // max(per_slot * side, num_parts * (side + 1) * side))
    masks = [
        _rasterize(edges[s], torch.where(p[:, None], parts[s], -1), num_parts, b, side)
        for s, p, b in zip(slot.split(chunk), present.split(chunk), boxes.split(chunk), strict=True)
    ]
    return torch.cat(masks).view(batch, regions, side, side)


def _rasterize(edges: Tensor, parts: Tensor, num_parts: int, boxes: Tensor, side: int) -> Tensor:
    """edges [N, E, 4], parts [N, E] (−1: no edge), boxes [N, 4] -> float32 [N, side, side]."""
    count = edges.shape[0]
    points = _sub_pixels(edges, boxes[:, None], side)[:, :, None]  # [N, E, 1, 4]
    column = torch.arange(side, dtype=torch.float64, device=edges.device)
    crosses, row = _crossing(points, column, side)  # [N, E, side]
    crosses = crosses & (parts >= 0)[:, :, None]
    # a plane per box and part, of rows 0 … side (the last is below the mask)
    plane = torch.arange(count, device=edges.device)[:, None] * num_parts + parts.clamp(min=0)  # [N, E]
    place = (plane[:, :, None] * (side + 1) + row.long()) * side + column.long()
    zeros = crosses.new_zeros(count * num_parts * (side + 1) * side, dtype=torch.int32)
    toggles = zeros.scatter_add(0, place.flatten(), crosses.flatten().int()).view(count, num_parts, side + 1, side)
    return (toggles[:, :, :-1].cumsum(2) % 2).amax(1).float()  # a pixel of any part


def _sub_pixels(edges: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Edges (xs, ys, xe, ye) and boxes in pixels -> integers in the frame of the scaled box, as float64."""
    edges, boxes = edges.double(), boxes.double()
    corner, size = boxes[..., :2], boxes[..., 2:] - boxes[..., :2]
    size = size.clamp(min=MIN_SIDE)
    scale = torch.full_like(size, side) / size  # number / tensor would multiply with the rounded reciprocal
    points = (edges.unflatten(-1, (2, 2)) - corner[..., None, :]) * scale[..., None, :]
    return torch.trunc(UPSAMPLING * points + 0.5).flatten(-2)


def _crossing(points: Tensor, column: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """points [..., 4] from `_sub_pixels`, column [...] -> does the edge cross the column, and the row 0 … side that it
    toggles.

    Broadcasting; the row is 0 where the edge does not cross.
    """
    xs, ys, xe, ye = points.unbind(-1)
    low = UPSAMPLING * column + 2  # the crossing is between sub-pixels low and low + 1
    crosses = (torch.minimum(xs, xe) <= low) & (torch.maximum(xs, xe) > low)
    dx, dy = (xe - xs).abs(), (ye - ys).abs()
    flat = dx >= dy
    flip = torch.where(flat, xs > xe, ys > ye)
    xs, xe = torch.where(flip, xe, xs), torch.where(flip, xs, xe)
    ys, ye = torch.where(flip, ye, ys), torch.where(flip, ys, ye)
    # flat edges walk in x: the smaller ordinate of the steps on both sides
    slope = (ye - ys) / dx
    before, after = torch.trunc(ys + slope * (low - xs) + 0.5), torch.trunc(ys + slope * (low + 1 - xs) + 0.5)
    ordinate = torch.minimum(before, after)
    # steep edges walk in y: the ordinate before the first step on the far side; a half step from `low` is the boundary
    slope = (xe - xs) / dy
    step = torch.round((low + 0.5 - xs) / slope)
    right = xs + slope * step + 0.5 >= low + 1
    step = torch.where(right == (slope > 0), step, step + 1)
    ordinate = torch.where(flat, ordinate, ys + step - 1)
    row = torch.ceil((ordinate + 0.5) / UPSAMPLING - 0.5).clamp(0, side)
    crosses = crosses & row.isfinite()
    return crosses, torch.where(crosses, row, 0)
