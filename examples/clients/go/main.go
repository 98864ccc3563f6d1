// One image from a running server, saved as a PNG file.
//
//	go mod init flashdiff
//	protoc -I proto --go_out=. --go_opt=module=flashdiff --go-grpc_out=. --go-grpc_opt=module=flashdiff v1/image.proto
//	go mod tidy
//	go run ./examples/clients/go 127.0.0.1:50051 "a green monster with horns" image.png
package main

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pb "flashdiff/proto/v1"
)

// Of a message; gRPC's own limit, 4 MiB, is too small for several large images.
const maxBytes = 64 << 20

func main() {
	if len(os.Args) != 4 {
		fmt.Fprintln(os.Stderr, "usage: generate ADDRESS PROMPT FILE")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2], os.Args[3]); err != nil {
		fmt.Fprintln(os.Stderr, "generate:", err)
		os.Exit(1)
	}
}

func run(address, prompt, file string) error {
	// On one machine; elsewhere grpc.WithTransportCredentials(credentials.NewTLS(nil)).
	conn, err := grpc.Dial(address, grpc.WithInsecure(), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxBytes)))
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	// So that the server refuses at once what would be larger.
	ctx = metadata.AppendToOutgoingContext(ctx, "flashdiff-max-message-bytes", strconv.Itoa(maxBytes))

	reply, err := generate(ctx, pb.NewImageServiceClient(conn), &pb.GenerateRequest{Prompt: prompt, Seed: proto.Uint64(7)})
	if err != nil {
		return err
	}
	fmt.Printf("seed %d, %.1f ms in the server\n", reply.Images[0].Seed, reply.Timings.TotalMs)
	return os.WriteFile(file, reply.Images[0].Data, 0o644)
}

// generate sends the request, and again when the server has no room and says when to retry, as long as the deadline allows.
func generate(ctx context.Context, client pb.ImageServiceClient, request *pb.GenerateRequest) (*pb.GenerateResponse, error) {
	for {
		var trailer metadata.MD
		reply, err := client.Generate(ctx, request, grpc.Trailer(&trailer))
		wait := trailer.Get("grpc-retry-pushback-ms")
		if status.Code(err) != codes.ResourceExhausted || len(wait) == 0 {
			return reply, err
		}
		ms, bad := strconv.Atoi(wait[0])
		if bad != nil {
			return nil, err
		}
		fmt.Printf("refused, again in %d ms\n", ms)
		select {
		case <-time.After(time.Duration(ms) * time.Millisecond):
		case <-ctx.Done():
			return nil, err
		}
	}
}
