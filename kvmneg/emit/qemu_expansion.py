# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading QEMU's reply to query-cpu-model-expansion as an ordinary report. Pure.

    {"return": {"model": {"name": "base", "props": {"avx2": true, "avx512f": false, "vendor": "GenuineIntel", …}}}}

The properties' names are the catalogue's; one name can stand for several bits (kvmclock). Of the model `host`
under KVM that is KVM's set joined with QEMU's, met with what QEMU knows. QEMU tells no capabilities, no VMX
revision and no XSAVE layout: components follow from the features that use them, and their layout is the vendor's
usual one.
"""

from __future__ import annotations

from kvmneg.emit.elements import Element
from kvmneg.emit.imported import SUPPORTED, Measured, identity
from kvmneg.features import catalog as catalogs
from kvmneg.features import words
from kvmneg.features.catalog import controls
from kvmneg.features.report import Report

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmneg.features.catalog import Feature

SOURCE = "qemu-expansion"
NOTE = "what QEMU {model} offers of what KVM supports: no capabilities; the XSAVE layout is its vendor's usual one"
_VENDOR = ("cpuid:0x0.0.ebx", "cpuid:0x0.0.edx", "cpuid:0x0.0.ecx")
_SIGNATURE = "cpuid:0x1.0.eax"
_XCR0 = "cpuid:0xd.0.eax"
# XSAVE component: the feature that uses it (QEMU target/i386/cpu.c, x86_ext_save_areas), its size, its offset on
# Intel and on AMD and Hygon (Intel SDM vol. 1, 13.5; AMD APM vol. 2, 11.5.2; None: that vendor has none), flags.
_COMPONENTS: dict[int, tuple[str, int, int, int | None, int]] = {
    2: ("avx", 0x100, 0x240, 0x240, 0),
    3: ("mpx", 0x40, 0x3C0, None, 0),
    4: ("mpx", 0x40, 0x400, None, 0),
    5: ("avx512f", 0x40, 0x440, 0x340, 0),
    6: ("avx512f", 0x200, 0x480, 0x380, 0),
    7: ("avx512f", 0x400, 0x680, 0x580, 0),
    9: ("pku", 8, 0xA80, 0x980, 0),
    17: ("amx-tile", 0x40, 0xAC0, None, 2),
    18: ("amx-tile", 0x2000, 0xB00, None, 6),
}
_SWITCH = ("on", "off", "auto")  # QEMU's OnOffAuto; "auto" is not settled before the CPU is realized
_AMD = ("AuthenticAMD", "HygonGenuine")


def read(data: bytes, measured: Measured) -> Report:
    """The report of one QMP reply.

    Raises BadInput, naming file and line, for a reply of another kind, and for a property that is not of
    its feature's type. Properties that are no CPUID bit, or that nobody classified, are not read.
    """
    reply = Element.loads(data, measured.file)
    failure = reply.find("error")
    if failure is not None:
        raise failure.wrong("QEMU answered with an error, not with a model")
    model = (reply.find("return") or reply).find("model")
    if model is None:
        raise reply.wrong("no reply to query-cpu-model-expansion: it has no 'model'")
    name = model.member("name").text()
    properties = dict(model.member("props").members())
    if not properties:
        raise model.wrong("the model has no property")
    offer = _identity(properties)
    for feature in catalogs.names(words.X86_64).by_name.values():
        element = properties.get(feature.qemu) if feature.qemu else None
        if element is not None:
            offer[feature.word] = offer.get(feature.word, 0) | _value(feature, element) << feature.shift
    _vmx_controls(properties, offer)
    who = identity(offer)
    offer |= _xsave(properties, amd=who["vendor"] in _AMD)
    return Report(
        words.X86_64,
        measured=measured.section(SOURCE, SUPPORTED, NOTE.format(model=name)),
        combo={},
        identity=who,
        offer=offer,
    )


def _vmx_controls(properties: dict[str, Element], offer: dict[str, int]) -> None:
    """Make the words of the controls that are set so far: as QEMU does (kvm_msr_entry_add_vmx), with the fixed ones."""
    table = catalogs.names(words.X86_64)
    if "lm" in properties and properties["lm"].value is True:
        size = table.by_name["vmx-exit-host-addr-space-size"]
        if offer.get(size.word):
            offer[size.word] |= size.mask
    for word in table.controls:
        found = offer.pop(word, 0)
        if found:
            offer[word] = controls.value_of(found >> controls.HALF, table.default1[word])


def _value(feature: Feature, element: Element) -> int:
    """A property's value; 0 for a number that QEMU has not settled (0 or -1 until the CPU is realized)."""
    value = element.value
    if feature.width == 1:
        if isinstance(value, bool):
            return int(value)
        if value not in _SWITCH:
            raise element.wrong(f"{words.brief(value)} is neither true nor false")
        return int(value == "on")
    number = max(_number(element), 0)
    if number >> feature.width:
        raise element.wrong(f"{number} has more than {feature.width} bits")
    return number


def _number(element: Element) -> int:
    value = element.value
    if not isinstance(value, int) or isinstance(value, bool) or not -1 <= value < 1 << 32:
        raise element.wrong(f"{words.brief(value)} is not a number of 32 bits")
    return value


def _identity(properties: dict[str, Element]) -> dict[str, int]:
    """Vendor and signature, where the reply has them."""
    found: dict[str, int] = {}
    if "vendor" in properties:
        letters = properties["vendor"].text().encode("latin-1", "replace")
        if len(letters) != 12:
            raise properties["vendor"].wrong("a vendor has 12 letters")
        parts = (letters[:4], letters[4:8], letters[8:])
        found |= {word: int.from_bytes(part, "little") for word, part in zip(_VENDOR, parts, strict=True)}
    numbers = [properties.get(name) for name in ("family", "model", "stepping")]
    if all(numbers):
        family, model, stepping = (max(_number(element), 0) for element in numbers if element)
        found[_SIGNATURE] = _signature(family, model, stepping)
    return found


def _signature(family: int, model: int, stepping: int) -> int:
    """CPUID 1.EAX of these three (Intel SDM vol. 2A: the extended fields)."""
    low, extended = min(family, 0xF), max(family - 0xF, 0)
    return (
        (extended & 0xFF) << 20 | (model >> 4 & 0xF) << 16 | low << 8 | (model & 0xF) << 4 | (stepping & 0xF)
    )


def _xsave(properties: dict[str, Element], *, amd: bool) -> dict[str, int]:
    """XCR0 and the layout of its components, as QEMU works them out from the features."""

    def has(name: str) -> bool:
        return name in properties and properties[name].value is True

    if not has("xsave"):
        return {}
    found = {_XCR0: 0b11}
    for component, (feature, size, intel, on_amd, flags) in _COMPONENTS.items():
        offset = on_amd if amd else intel
        if has(feature) and offset is not None:
            found[_XCR0] |= 1 << component
            for register, value in (("eax", size), ("ebx", offset), ("ecx", flags)):
                found[words.cpuid_word(0xD, component, register)] = value
    return found
