// The rows of dev/benchmarks/peers.py on llama.cpp, by node-llama-cpp: the same measurements as peer_process.py's.
//
//     node peer_llama_cpp.mjs LIBRARY MODEL TOKENS OUT [flash]
import {readFileSync, writeFileSync} from "node:fs";

const PASSES = 3, ENOUGH_S = 15;
const [, , library, model, tokens, out, flash] = process.argv;
const {getLlama, LlamaLogLevel} = await import(`${library}/node_modules/node-llama-cpp/dist/index.js`);

const rows = JSON.parse(readFileSync(tokens));
const size = Math.max(...rows.map((row) => row.length)) + 1;
const llama = await getLlama({gpu: false, build: "never", skipDownload: true, maxThreads: 1, logLevel: LlamaLogLevel.error});
// The mean over tokens is the model's to ask for; the shipped file asks for none, which would give the last token's.
const loaded = await llama.loadModel({
    modelPath: model, gpuLayers: 0, metadataOverrides: {llama: {pooling_type: 1}},
    defaultContextFlashAttention: flash === "flash"
});
const context = await loaded.createEmbeddingContext({contextSize: size, batchSize: size, threads: 1});

async function timed(some) {
    const seconds = [];
    let vectors;
    while (seconds.length < PASSES && seconds.reduce((a, b) => a + b, 0) < ENOUGH_S) {
        const began = process.cpuUsage();
        vectors = [];
        for (const row of some) vectors.push((await context.getEmbeddingFor([...row])).vector);
        const {user, system} = process.cpuUsage(began);
        seconds.push((user + system) / 1e6);
    }
    return [Math.min(...seconds), vectors];
}

const [seconds, vectors] = await timed(rows);
const one = seconds / rows.length;
const peak = Number(/VmHWM:\s+(\d+)/.exec(readFileSync("/proc/self/status", "utf8"))[1]) * 1024;
writeFileSync(out, JSON.stringify({seconds, one, peak, vectors, system: llama.systemInfo}));
process.exit(0);
