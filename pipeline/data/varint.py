"""Variable-length integers (varints) of protocol buffers and of Thrift's compact protocol."""


def read_varint(view: memoryview, position: int) -> tuple[int, int]:
    """(value, position after it): seven bits a byte, the lowest first. Raises IndexError at the end of `view`,
    ValueError for more than 64 bits."""
    value = shift = 0
    while True:
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("an integer of more than 64 bits")
