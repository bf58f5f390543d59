# SPDX-License-Identifier: LGPL-2.1-or-later
"""Nested virtualisation is granted with a format that its state can move in, or not at all. Pure.

A guest with VMX or SVM on moves only to a host whose nested state has the same format (KVM_CAP_NESTED_STATE,
state:nested): a pool whose kernels differ has none in common, and a fence of it holds no size.
"""

from __future__ import annotations

from kvmneg.features import catalog as catalogs
from kvmneg.features.featureset import FeatureSet

WORD = "state:nested"
_PAIRS = (("vmx", "state-nested-vmx"), ("svm", "state-nested-svm"))


def movable(met: FeatureSet, fence: FeatureSet, offer: FeatureSet) -> FeatureSet:
    """An offer bounded by a fence, without VMX or SVM where the host has a format and the fence has none.

    A fence that names no state at all was made by an older kvmneg: what it says nothing about is not known.
    """
    if WORD not in offer.words or not any(word.startswith("state:") for word in fence.words):
        return met
    table = catalogs.names(met.architecture).by_name
    values = dict(met.words)
    for name, format_name in _PAIRS:
        feature, size = table[name], table[format_name]
        if feature.word in values and size.of(offer.value(WORD)) and not size.of(met.value(WORD)):
            values[feature.word] &= ~feature.mask
    return met if values == met.words else FeatureSet.of(met.architecture, values)
