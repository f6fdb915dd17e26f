// The text chunks of a PNG: {keyword: text}. Other files give {}.

export async function textOf(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  const view = new DataView(bytes.buffer);
  const found = {};
  if (bytes.length < 8 || view.getUint32(0) !== 0x89504e47) return found;
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    const type = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    const data = bytes.subarray(at + 8, at + 8 + length);
    if (type === "tEXt") {
      const end = data.indexOf(0);
      found[latin(data.subarray(0, end))] = latin(data.subarray(end + 1));
    } else if (type === "iTXt") {
      const end = data.indexOf(0);
      // keyword 0, compressed?, method, language 0, translated 0, text in UTF-8
      const language = data.indexOf(0, end + 3);
      const translated = data.indexOf(0, language + 1);
      if (data[end + 1] === 0) found[latin(data.subarray(0, end))] = new TextDecoder().decode(data.subarray(translated + 1));
    }
    at += length + 12;
  }
  return found;
}

const latin = (bytes) => new TextDecoder("latin1").decode(bytes);
