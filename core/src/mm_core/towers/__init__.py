"""Vision towers that several families share: CLIP and SigLIP over equal square tiles.

For plugin authors::

    tower = make_tower(config["vision_config"], context, layers=-2)      # by its model_type
    passes = TilePasses(tower.config, Normalisation(mean, std), context)
    rows = passes([tiles, …], tower)         # uint8 [k, S, S, 3] each → [all tiles, tokens, tower.out_size]
    weight_map = tower_weight_map(tower, r"(?:model\\.)?vision_tower\\.", "tower.")

S is `tower.config.pixels`: the processor resizes to `image_size` and drops what no patch covers. `layers`
counts as `hidden_states` of transformers does; of several, the channels are joined. What `passes` runs may be
more than the tower (a projector behind it); an encoder's `use_graphs()` hands on to `passes.use_graphs()`.
"""

from mm_core.towers.base import TowerConfig, VisionTower, activation, tower_weight_map
from mm_core.towers.choice import make_tower, tower_config
from mm_core.towers.clip import ClipConfig, ClipTower
from mm_core.towers.siglip import SiglipConfig, SiglipTower
from mm_core.towers.tiles import TilePasses

__all__ = [
    "ClipConfig",
    "ClipTower",
    "SiglipConfig",
    "SiglipTower",
    "TilePasses",
    "TowerConfig",
    "VisionTower",
    "activation",
    "make_tower",
    "tower_config",
    "tower_weight_map",
]
