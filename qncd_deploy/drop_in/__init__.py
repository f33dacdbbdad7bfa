"""Bundles inside diffusers' own pipelines: the network in place of `pipe.unet`, the corrections in `pipe.scheduler`."""
