"""Triton where it is installed; elsewhere (macOS) stand-ins with which a kernel file imports but cannot launch."""

try:
    import triton
    from triton import language as tl
except ImportError:

    class triton:
        """What kernel files use of `triton` when they are imported."""

        @staticmethod
        def jit(function=None, **options):
            """Leave the function as it is; a decorator with and without arguments, as `triton.jit`."""
            return function or (lambda decorated: decorated)

    class tl:
        """What kernel files use of `triton.language` when they are imported."""

        constexpr = object


__all__ = ["tl", "triton"]
