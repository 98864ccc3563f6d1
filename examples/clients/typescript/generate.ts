// One image from a running server, saved as a PNG file. The types come from the .proto:
//
//   npm install @grpc/grpc-js @grpc/proto-loader typescript @types/node
//   npx proto-loader-gen-types v1/image.proto --grpcLib=@grpc/grpc-js --longs=String --outDir=generated \
//     --includeDirs=../../../proto
//   npx tsc && node generate.js 127.0.0.1:50051 "a green monster with horns" image.png ../../../proto

import { writeFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import * as grpc from '@grpc/grpc-js';
import { loadSync } from '@grpc/proto-loader';
import type { GenerateRequest } from './generated/flashdiff/v1/GenerateRequest';
import type { GenerateResponse__Output } from './generated/flashdiff/v1/GenerateResponse';
import type { ImageServiceClient } from './generated/flashdiff/v1/ImageService';
import type { ProtoGrpcType } from './generated/image';

// Of a message; gRPC's own limit, 4 MiB, is too small for several large images.
const MAX_BYTES = 64 * 1024 * 1024;

/** The reply; the request is sent again when the server has no room and says when to retry, until the deadline. */
async function generate(client: ImageServiceClient, request: GenerateRequest, deadline: Date): Promise<GenerateResponse__Output> {
  // So that the server refuses at once what would be larger.
  const metadata = new grpc.Metadata();
  metadata.set('flashdiff-max-message-bytes', String(MAX_BYTES));
  for (;;) {
    try {
      return await new Promise((resolve, reject) => {
        client.Generate(request, metadata, { deadline }, (error, reply) => (error ? reject(error) : resolve(reply!)));
      });
    } catch (error) {
      const { code, metadata: trailers } = error as grpc.ServiceError;
      const [wait] = trailers?.get('grpc-retry-pushback-ms') ?? [];
      if (code !== grpc.status.RESOURCE_EXHAUSTED || wait === undefined) {
        throw error;
      }
      console.log(`refused, again in ${wait} ms`);
      await sleep(Number(wait));
    }
  }
}

async function main([address, prompt, file, protos]: string[]): Promise<void> {
  if (!address || !prompt || !file || !protos) {
    throw new Error('usage: generate ADDRESS PROMPT FILE PROTOS');
  }
  const definition = loadSync('v1/image.proto', { includeDirs: [protos], longs: String });
  const { flashdiff } = grpc.loadPackageDefinition(definition) as unknown as ProtoGrpcType;
  // On one machine; elsewhere grpc.credentials.createSsl().
  const client = new flashdiff.v1.ImageService(address, grpc.credentials.createInsecure(), {
    'grpc.max_receive_message_length': MAX_BYTES,
  });
  try {
    const reply = await generate(client, { prompt, seed: 7 }, new Date(Date.now() + 20_000));
    const image = reply.images![0];
    writeFileSync(file, image.data as Buffer);
    console.log(`seed ${image.seed}, ${reply.timings!.totalMs!.toFixed(1)} ms in the server`);
  } finally {
    client.close();
  }
}

main(process.argv.slice(2)).catch((error: Error) => {
  console.error(`generate: ${error.message}`);
  process.exitCode = 1;
});
