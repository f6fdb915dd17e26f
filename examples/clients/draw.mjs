// Draw from JavaScript, with every scale as it arrives: node examples/clients/draw.mjs CONTROL.png CLASS OUT.png [SERVER]
// Node 18 or newer, no packages. CAR_TOKEN is the server's token, if it has one.
import { readFile, writeFile } from "node:fs/promises";

const [control, label, output, server = "http://127.0.0.1:8080"] = process.argv.slice(2);
const answer = await fetch(`${server}/v1/pictures`, {
  method: "POST",
  headers: {
    Accept: "text/event-stream",
    "Content-Type": "application/json",
    Authorization: `Bearer ${process.env.CAR_TOKEN ?? "none"}`,
  },
  body: JSON.stringify({ control: (await readFile(control)).toString("base64"), class: label, seed: 7 }),
});
if (!answer.ok) {
  console.error((await answer.json()).error.message);
  process.exit(1);
}
let text = "";
const decoder = new TextDecoder();
for await (const chunk of answer.body) {
  text += decoder.decode(chunk, { stream: true });
  const blocks = text.split("\n\n");
  text = blocks.pop(); // not whole yet
  for (const block of blocks) {
    const name = block.match(/^event: (.*)$/m)[1];
    const event = JSON.parse(block.match(/^data: (.*)$/m)[1]);
    if (name === "scale") console.error(`scale ${event.index}: ${event.side}×${event.side} tokens`);
    if (name === "error") throw new Error(event.message);
    if (name === "picture") {
      await writeFile(output, Buffer.from(event.png, "base64"));
      console.log(output);
    }
  }
}
