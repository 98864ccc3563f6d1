import com.google.protobuf.ByteString;
import flashdiff.v1.GenerateRequest;
import flashdiff.v1.GenerateResponse;
import flashdiff.v1.ImageServiceGrpc;
import flashdiff.v1.ImageServiceGrpc.ImageServiceBlockingStub;
import io.grpc.Deadline;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import io.grpc.Metadata;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.stub.MetadataUtils;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.concurrent.TimeUnit;

/**
 * One image from a running server, saved as a PNG file. The classes of flashdiff.v1 come from protoc:
 *
 * <pre>protoc -I proto --java_out=generated --grpc-java_out=generated v1/image.proto</pre>
 */
public final class Generate {
    /** Of a message; gRPC's own limit, 4 MiB, is too small for several large images. */
    private static final int MAX_BYTES = 64 << 20;

    private static final Metadata.Key<String> RETRY_MS = key("grpc-retry-pushback-ms");
    private static final Metadata.Key<String> STATED_LIMIT = key("flashdiff-max-message-bytes");

    public static void main(String[] arguments) throws Exception {
        if (arguments.length != 3) {
            System.err.println("usage: Generate ADDRESS PROMPT FILE");
            System.exit(2);
        }
        // On one machine; elsewhere without usePlaintext().
        ManagedChannel channel =
                ManagedChannelBuilder.forTarget(arguments[0]).usePlaintext().maxInboundMessageSize(MAX_BYTES).build();
        try {
            // So that the server refuses at once what would be larger.
            Metadata stated = new Metadata();
            stated.put(STATED_LIMIT, String.valueOf(MAX_BYTES));
            ImageServiceBlockingStub stub =
                    ImageServiceGrpc.newBlockingStub(channel)
                            .withInterceptors(MetadataUtils.newAttachHeadersInterceptor(stated))
                            .withDeadline(Deadline.after(20, TimeUnit.SECONDS));
            GenerateResponse reply =
                    generate(stub, GenerateRequest.newBuilder().setPrompt(arguments[1]).setSeed(7).build());
            ByteString png = reply.getImages(0).getData();
            Files.write(Path.of(arguments[2]), png.toByteArray());
            System.out.printf(
                    "seed %d, %.1f ms in the server%n", reply.getImages(0).getSeed(), reply.getTimings().getTotalMs());
        } catch (StatusRuntimeException error) {
            System.err.println("Generate: " + error.getStatus().getCode() + ": " + error.getStatus().getDescription());
            System.exit(1);
        } finally {
            channel.shutdown();
        }
    }

    /** Sends the request, and again when the server has no room and says when to retry, until the deadline. */
    private static GenerateResponse generate(ImageServiceBlockingStub stub, GenerateRequest request)
            throws InterruptedException {
        while (true) {
            try {
                return stub.generate(request);
            } catch (StatusRuntimeException error) {
                String wait = error.getTrailers() == null ? null : error.getTrailers().get(RETRY_MS);
                if (error.getStatus().getCode() != Status.Code.RESOURCE_EXHAUSTED || wait == null) {
                    throw error;
                }
                System.out.printf("refused, again in %s ms%n", wait);
                Thread.sleep(Long.parseLong(wait));
            }
        }
    }

    private static Metadata.Key<String> key(String name) {
        return Metadata.Key.of(name, Metadata.ASCII_STRING_MARSHALLER);
    }
}
