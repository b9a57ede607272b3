"""Vectors of numbers in functions that Numba compiles: LLVM's vector types, which it maps to the registers of any CPU.

Numba vectorizes whole loops only. Where a loop is short or its data is interleaved, these functions state which numbers
are computed together. Indices of arrays count elements; nothing is checked.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic, models, register_model

_I8, _I32, _F32 = ir.IntType(8), ir.IntType(32), ir.FloatType()


class Vector(types.Type):  # type: ignore[misc]
    """``count`` numbers of a type, int32 or float32."""

    def __init__(self, scalar: types.Type, count: int) -> None:
        self.scalar, self.count = scalar, count
        super().__init__(f"Vector({scalar}, {count})")

    @property
    def llvm(self) -> ir.VectorType:
        return ir.VectorType(_I32 if self.scalar == types.int32 else _F32, self.count)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, kind.llvm)


def _pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any, of: ir.Type) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), of.as_pointer())


def _shuffled(builder: Any, vector: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


def _splat(builder: Any, value: Any, count: int) -> Any:
    undefined = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
    return _shuffled(builder, builder.insert_element(undefined, value, _I32(0)), [0] * count)


def _shifted_bytes(builder: Any, totals: Any, shift: int) -> Any:
    count = totals.type.count
    return builder.trunc(builder.lshr(totals, _splat(builder, _I32(shift), count)), ir.VectorType(_I8, count))


def filled(scalar: types.Type, count: int) -> Any:
    """``filled(value)``: a vector of equal numbers."""
    kind = Vector(scalar, count)

    @intrinsic  # type: ignore[untyped-decorator]
    def function(_context: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return _splat(builder, arguments[0], count)

        return kind(scalar), generate

    return function


def add_product(scalar: types.Type, count: int) -> Any:
    """``add_product(total, array, index, weight)``: the total plus a weight times the numbers from an index on.

    The array holds bytes for int32, or float32. The product is rounded before it is added.
    """
    kind, is_int = Vector(scalar, count), scalar == types.int32

    @intrinsic  # type: ignore[untyped-decorator]
    def function(_context: Any, total: Any, array: Any, index: Any, weight: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            element = _I8 if is_int else _F32
            pointer = _pointer(context, builder, array, arguments[1], arguments[2], ir.VectorType(element, count))
            values = builder.load(pointer, align=1 if is_int else 4)
            weights = _splat(builder, arguments[3], count)
            if is_int:
                return builder.add(arguments[0], builder.mul(builder.zext(values, kind.llvm), weights))
            return builder.fadd(arguments[0], builder.fmul(values, weights))

        return kind(kind, array, types.uint64, scalar), generate

    return function


def store_bytes(count: int, shift: int) -> Any:
    """``store_bytes(array, index, totals)``: the low bytes of int32 totals, shifted to the right."""
    kind = Vector(types.int32, count)

    @intrinsic  # type: ignore[untyped-decorator]
    def function(_context: Any, array: Any, index: Any, totals: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = _pointer(context, builder, array, arguments[0], arguments[1], ir.VectorType(_I8, count))
            builder.store(_shifted_bytes(builder, arguments[2], shift), pointer, align=1)
            return context.get_dummy_value()

        return types.void(array, types.uint64, kind), generate

    return function


def store_planes(pixels: int, shift: int) -> Any:
    """``store_planes(red, green, blue, index, totals)``: the low bytes of int32 totals [4 ``pixels``] after a shift to
    the right, to one array for each color; each fourth total is unused."""
    kind = Vector(types.int32, 4 * pixels)

    @intrinsic  # type: ignore[untyped-decorator]
    def function(_context: Any, red: Any, green: Any, blue: Any, index: Any, totals: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            interleaved = _shifted_bytes(builder, arguments[4], shift)
            of_plane = ir.VectorType(_I8, pixels)
            for c, array in enumerate((red, green, blue)):
                plane = _shuffled(builder, interleaved, [4 * p + c for p in range(pixels)])
                pointer = _pointer(context, builder, array, arguments[c], arguments[3], of_plane)
                builder.store(plane, pointer, align=1)
            return context.get_dummy_value()

        return types.void(red, green, blue, types.uint64, kind), generate

    return function


def store_floats(count: int) -> Any:
    """``store_floats(array, index, values)``."""
    kind = Vector(types.float32, count)

    @intrinsic  # type: ignore[untyped-decorator]
    def function(_context: Any, array: Any, index: Any, values: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = _pointer(context, builder, array, arguments[0], arguments[1], kind.llvm)
            builder.store(arguments[2], pointer, align=4)
            return context.get_dummy_value()

        return types.void(array, types.uint64, kind), generate

    return function
