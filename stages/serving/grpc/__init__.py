"""The gRPC wing: `inference.GRPCInferenceService` (KServe version 2, with Triton's additions) over the port `Inference`.

It needs the extra `grpc`; `endpoint` imports grpcio only when an endpoint starts. It imports `stages.serving` and `bus`;
`deploy` may import `endpoint`.
"""
