"""What an export would do, without calibrating or writing anything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qncd_deploy.pipeline.bits import check_budget
from qncd_deploy.pipeline.export import bundle_folder
from qncd_deploy.pipeline.network import read_network
from qncd_deploy.pipeline.options import ExportOptions
from qncd_deploy.pipeline.quantize import policy_of
from qncd_deploy.pipeline.splitting import candidates
from qncd_deploy.quant.decide import check_patterns, decide
from qncd_deploy.quant.plan import LayerSite


@dataclass(frozen=True, eq=False)
class DryRun:
    """Every weighted op with whether it would be quantized and why; where the bundle would go; how many
    residual blocks smoothing is tried on, and splitting on how many convolutions."""

    folder: Path
    layers: tuple[tuple[LayerSite, bool, str], ...]
    residual_blocks: int
    skip_convolutions: int

    def to_json(self) -> dict[str, Any]:
        return {
            "bundle": str(self.folder),
            "residual_blocks": self.residual_blocks,
            "skip_convolutions": self.skip_convolutions,
            "layers": [
                {"name": site.name, "op": site.op, "shape": list(site.shape), "quantized": wanted, "reason": reason}
                for site, wanted, reason in self.layers
            ],
        }

    def lines(self) -> Iterator[str]:
        for site, wanted, reason in self.layers:
            shape = "x".join(map(str, site.shape))
            yield f"{'quantize' if wanted else 'float':8}  {site.op:6}  {shape:18}  {site.name}  ({reason})"
        count = sum(wanted for _, wanted, _ in self.layers)
        yield (
            f"{count} of {len(self.layers)} weighted layers, {self.residual_blocks} residual blocks to smooth, "
            f"{self.skip_convolutions} convolutions of skip concatenations to split"
        )
        yield f"would write {self.folder}; nothing was written"


def dry_run(options: ExportOptions) -> DryRun:
    """Read and trace the network, and decide. Raises as an export would up to there."""
    policy = policy_of(options)
    network = read_network(options)
    check_patterns(network.sites, policy)
    check_budget(network.sites, options, policy)
    layers = tuple((site, *decide(site, policy)) for site in network.sites)
    if not options.rounds_activations:
        return DryRun(bundle_folder(options), layers, 0, 0)
    skips = candidates(network, options, policy)
    quantized = {site.name for site, wanted, _ in layers if wanted}
    blocks = () if options.smooth == "off" else [b for b in network.resblocks if b.conv2 in quantized]
    return DryRun(bundle_folder(options), layers, len(blocks), len(skips))
