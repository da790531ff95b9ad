"""The embedded world: coloured shapes that move over a background, and a tiny model in diffusers layout to draw them."""
