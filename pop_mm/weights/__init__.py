"""How channels lie in a module's weights: layers, experts, shards."""
