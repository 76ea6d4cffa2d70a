"""PEP 517 hooks: setuptools' own, which ask for torch only when no installed torch has usable headers.

pip's build isolation hides site-packages from `sys.path` but keeps `sys.prefix`, so the torch of the
environment that qkernels is installed into is found there. Other front ends build in an empty environment;
they are asked for torch.
"""

import native
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403


def _torch():
    return [] if native.find_torch() or not native.wanted() else [f"torch>={native.MINIMUM_TORCH}"]


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _torch()
