"""What a dense batch keeps of a model: every position of every attention layer, windows or not."""

from dataclasses import replace

from kvkeep.hf.geometry import LayerPlace, ModelGeometry
from kvkeep.spec import GroupSpec, LayerKind

__all__ = ["retain_all"]

_Widths = tuple[int, int, int, int]


def retain_all(geometry: ModelGeometry) -> ModelGeometry:
    """The same model with all attention layers of one shape in one group of full attention.

    A model that attends in its own way builds masks that enforce its windows over all positions, and
    assisted decoding takes tokens back, whose windows begin earlier. Recurrent groups stay.
    """
    widths_to_groups: dict[_Widths, list[GroupSpec]] = {}
    recurrent = []
    for group in geometry.spec.groups:
        if group.kind is LayerKind.RECURRENT:
            recurrent.append(group)
        else:
            widths = (group.k_heads, group.k_dim, group.v_heads, group.v_dim)
            widths_to_groups.setdefault(widths, []).append(group)
    groups = [_merge(parts) for parts in widths_to_groups.values()] + recurrent
    places = {
        layer: LayerPlace(number, within)
        for number, group in enumerate(groups)
        for within, layer in enumerate(group.layers)
    }
    old_layers = {place: layer for layer, place in geometry.places.items() if layer in places}
    for layer in geometry.consumers:
        places[layer] = places[old_layers[geometry.places[layer]]]
    return replace(geometry, spec=replace(geometry.spec, groups=tuple(groups)), places=places)


def _merge(parts: list[GroupSpec]) -> GroupSpec:
    first = parts[0]
    return replace(
        first,
        name=f"{LayerKind.FULL.value}-{first.k_heads}x{first.k_dim}",
        kind=LayerKind.FULL,
        window=None,
        layers=tuple(sorted(layer for part in parts for layer in part.layers)),
    )
