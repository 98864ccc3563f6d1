"""The numbers that `flashdiff.v1` has for formats and priorities, for both ends of the wire."""

from flashdiff.proto.v1 import image_pb2 as pb
from flashdiff.server.names import ImageFormat, Priority

FORMATS: dict[int, ImageFormat] = {
    pb.IMAGE_FORMAT_UNSPECIFIED: "png",
    pb.IMAGE_FORMAT_PNG: "png",
    pb.IMAGE_FORMAT_JPEG: "jpeg",
    pb.IMAGE_FORMAT_WEBP: "webp",
    pb.IMAGE_FORMAT_RAW_RGB: "raw",
}
FORMAT_NUMBERS: dict[ImageFormat, pb.ImageFormat] = {
    "png": pb.IMAGE_FORMAT_PNG,
    "jpeg": pb.IMAGE_FORMAT_JPEG,
    "webp": pb.IMAGE_FORMAT_WEBP,
    "raw": pb.IMAGE_FORMAT_RAW_RGB,
}
PRIORITIES: dict[int, Priority] = {pb.PRIORITY_NORMAL: "normal", pb.PRIORITY_HIGH: "high", pb.PRIORITY_LOW: "low"}
PRIORITY_NUMBERS: dict[Priority, pb.Priority] = {"normal": pb.PRIORITY_NORMAL, "high": pb.PRIORITY_HIGH, "low": pb.PRIORITY_LOW}
