"""Components made by another library, diffusers' or transformers', as svdlab's own on the same weights.

They are known by what they have: a ``config`` and a ``state_dict``, or an image processor's statistics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from svdlab.errors import SvdlabError, short
from svdlab.svd import workloads
from svdlab.svd.checkpoint import ImageNormalization
from svdlab.svd.config import CONFIGS, Config, read_config
from svdlab.svd.kernels import use_kernels
from svdlab.svd.sampler import EulerScheduler
from svdlab.svd.schedulers import is_scheduler

# In the order of diffusers' constructor.
NETWORKS = ("vae", "image_encoder", "unet")
COMPONENTS = (*NETWORKS, "scheduler", "feature_extractor")


def adopt(name: str, component: Any) -> Any:
    """svdlab's own component for one that a pipeline is given.

    Args:
        name: one of ``COMPONENTS``.
        component: svdlab's own, which is returned as it is, also compiled; or another library's. A network's weights
            are shared with the result, not copied; so an edit of them is in both. A scheduler that is not SVD's Euler
            is returned as it is, and called as diffusers calls it.

    Raises:
        SvdlabError: a component that svdlab does not implement or whose additions (hooks, adapters, compilation)
            it would lose.
    """
    if name in NETWORKS:
        return _network(name, component)
    own: type[Config] = EulerScheduler if name == "scheduler" else ImageNormalization
    if isinstance(component, own):
        return component
    if name == "scheduler" and is_scheduler(component):
        options = {option: value for option, value in dict(component.config).items() if value is not None}
        try:
            return EulerScheduler.from_config({**options, "_class_name": type(component).__name__})
        except SvdlabError:  # another sampler, which brings its own rules
            return component
    if name == "feature_extractor" and hasattr(component, "image_mean") and hasattr(component, "image_std"):
        statistics = {"image_mean": tuple(component.image_mean), "image_std": tuple(component.image_std)}
        return read_config(ImageNormalization, statistics, f"{name}: {type(component).__name__}")
    raise SvdlabError(f"{name}: got {short(component)}, allowed: svdlab's or diffusers' own")


def _network(name: str, component: Any) -> nn.Module:
    own, config_class = workloads.NETWORKS[name], CONFIGS[name]
    plain = getattr(component, "_orig_mod", component)  # of torch.compile
    if isinstance(plain, own):
        return component
    if not isinstance(plain, nn.Module) or not hasattr(plain, "config"):
        raise SvdlabError(f"{name}: got {short(type(component).__name__)}, allowed: svdlab's or diffusers' own")
    where = f"{name}: {type(plain).__name__}"
    if plain is not component:
        raise SvdlabError(f"{where} is compiled, allowed: give it as it is and compile the pipeline's own {name}")
    for path, module in plain.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
            raise SvdlabError(f"{where} has hooks on {path or 'itself'}, which would be lost, allowed: none")
    options = dict(plain.config.to_dict() if hasattr(plain.config, "to_dict") else plain.config)
    if name == "image_encoder":  # transformers' configs hold much that is of no network
        options = {option: value for option, value in options.items() if option in config_class.model_fields}
    with torch.device("meta"):
        network = own(read_config(config_class, options, where))
    try:
        network.load_state_dict(plain.state_dict(), strict=True, assign=True)
    except RuntimeError as error:
        raise SvdlabError(f"{where}: its weights are not those that its config wants: {error}") from None
    return use_kernels(network.eval().requires_grad_(False))
