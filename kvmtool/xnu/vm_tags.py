"""What map entries are tagged with: VM_MEMORY_… of programs, VM_KERN_MEMORY_… of the kernel.

Source: osfmk/mach/vm_statistics.h, xnu-792..11417. Numbers were only ever added, but for those
that Apple's own frameworks gave back.
"""

from __future__ import annotations

_USER = {
    1: "malloc malloc_small malloc_large malloc_huge sbrk realloc malloc_tiny "
    "malloc_large_reusable malloc_large_reused analysis_tool malloc_nano malloc_medium "
    "malloc_prob_guard",
    20: "mach_msg iokit",
    30: "stack guard shared_pmap dylib objc_dispatchers unshared_pmap",
    40: "appkit foundation coregraphics coreservices java coredata coredata_objectids",
    50: "ats layerkit cgimage tcmalloc coregraphics_data coregraphics_shared "
    "coregraphics_framebuffers coregraphics_backingstores coregraphics_xalloc",
    60: "dyld dyld_malloc sqlite javascript_core javascript_jit_executable_allocator "
    "javascript_jit_register_file glsl opencl coreimage webcore_purgeable_buffers imageio "
    "coreprofile assetsd os_alloc_once libdispatch accelerate coreui coreuifile genealogy "
    "rawcamera corpseinfo asl swift_runtime swift_metadata dhmm",
    86: "scenekit skywalk iosurface libnetwork audio videobitstream cm_xpc cm_rpc cm_memorypool "
    "cm_readcache cm_crabs quicklook_thumbnails accounts sanitizer ioaccelerator cm_regwarp "
    "ear_decoder coreui_cached_image_data colorsync btinfo cm_hls",
    230: "rosetta rosetta_thread_context rosetta_indirect_branch_map rosetta_return_stack "
    "rosetta_executable_heap rosetta_user_ldt rosetta_arena",
    239: "rosetta_10",
    240: " ".join(f"application_specific_{number}" for number in range(1, 17)),
}
_KERNEL = {
    0: "none osfmk bsd iokit libkern oskext kext ipc stack cpu pmap pte zone kalloc compressor "
    "compressed_data phantom_cache waitq diag log file mbuf ubc security mlock reason skywalk "
    "ltable hv kalloc_data retired kalloc_type triage recount mtag exclaves exclaves_shared "
    "kalloc_shared cputrace",
}


def _numbered(names: dict[int, str]) -> dict[int, str]:
    return {
        first + place: name
        for first, line in names.items()
        for place, name in enumerate(line.split())
    }


USER, KERNEL = _numbered(_USER), _numbered(_KERNEL)


def tag_name(tag: int, kernel: bool) -> str | None:
    """The tag in a word; None for 0 and for numbers that have no name."""
    return (KERNEL if kernel else USER).get(tag) if tag else None
