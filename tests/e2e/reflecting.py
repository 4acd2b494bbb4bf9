"""Every method of a running server, by its reflection. No test lives here."""

from collections.abc import Iterator

import grpc
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc


def methods_of(channel: grpc.Channel, token: str | None = None) -> set[str]:
    """Paths such as "/quickchange.v1.ServerService/Drain", of every service that the server lists."""
    metadata = [("authorization", f"Bearer {token}")] if token else []

    def ask(**what: str) -> reflection_pb2.ServerReflectionResponse:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(**what)
        return next(stub.ServerReflectionInfo(iter([request]), timeout=20, metadata=metadata))

    def found() -> Iterator[str]:
        for service in ask(list_services="").list_services_response.service:
            answer = ask(file_containing_symbol=service.name).file_descriptor_response
            for raw in answer.file_descriptor_proto:
                file = FileDescriptorProto.FromString(raw)
                for each in file.service:
                    if f"{file.package}.{each.name}" == service.name:
                        yield from (f"/{service.name}/{method.name}" for method in each.method)

    return set(found())
