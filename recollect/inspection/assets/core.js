// The data, small DOM builders, number formats, the tooltip, colours that follow the theme, and what is chosen on the page.
const DATA = JSON.parse(document.getElementById("data").textContent);
const LENGTH = DATA.tokens.length;
const tip = document.getElementById("tip");
const theme = matchMedia("(prefers-color-scheme: dark)");
const get = (id) => document.getElementById(id);

// layer, head: as chosen. quantity: a strip's key, or "reads". token: under the cursor. reader: whose read is followed.
const state = { layer: Math.min(1, DATA.layers.length - 1), head: 0, quantity: null, token: null, reader: LENGTH - 1 };
const layer = () => DATA.layers[state.layer];

function node(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// A labelled <select>; options are [value, text]; `changed` gets the value.
function select(label, options, chosen, changed) {
  const box = node("select", {}, ...options.map(([value, text]) => node("option", { value }, text)));
  box.value = String(chosen);
  box.addEventListener("change", () => changed(box.value));
  return node("label", {}, label, box);
}

function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = x + 14 + width > innerWidth ? x - width - 14 : x + 14;
  const top = y + 18 + height > innerHeight ? y - height - 14 : y + 18;
  tip.style.left = `${Math.max(6, Math.min(left, innerWidth - width - 6))}px`;
  tip.style.top = `${Math.max(6, top)}px`;
}

function hideTip() { tip.hidden = true; }

// About three digits, with a real minus sign.
function numberText(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "no number";
  const size = Math.abs(value);
  if (value > 0.99 && value < 1) return `1 \u2212 ${+(1 - value).toPrecision(2)}`;
  const text = size === 0 ? "0" : size >= 1000 ? value.toPrecision(4) : size >= 0.001 ? String(+value.toPrecision(3)) : value.toExponential(1);
  return text.replace("-", "\u2212");
}

const signed = (n) => (n > 0 ? `+${n}` : n < 0 ? `\u2212${-n}` : "0");

// How a token is written: nothing of its own for the later bytes of a character.
function tokenText(i) {
  const text = DATA.tokens[i];
  if (i === 0 && text === "") return "\u25b8";
  return text === "" ? "\u00b7" : text.replace(/\n/g, "\u21b5\n");
}
function tokenName(i) {
  const text = DATA.tokens[i];
  const shown = i === 0 && text === "" ? "start of the document" : text === "" ? "(a later byte)" : `\u201c${text.replace(/\n/g, "\u21b5").replace(/^ +$/, "\u2423")}\u201d`;
  return `token ${i.toLocaleString("en")} ${shown}`;
}

function cssColor(name) {
  const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
}

// Colour scales as functions of value / scale. `diverging`: low - zero - high; `sequential`: square root, so that small weights show.
function ramp(kind) {
  const [zero, high, low, warm] = ["--zero", "--high", "--low", "--warm"].map(cssColor);
  const mix = (a, b, t) => a.map((x, i) => x + (b[i] - x) * t);
  if (kind === "sequential") return (x) => mix(zero, warm, Math.sqrt(Math.min(Math.max(x, 0), 1)));
  return (x) => mix(zero, x < 0 ? low : high, Math.min(Math.abs(x), 1));
}

function bytesOf(text) { return Uint8Array.from(atob(text), (c) => c.charCodeAt(0)); }

// The numbers of something packed: an offset and float16 in base64 times a scale. Unpacked when first looked at, and kept.
const unpacked = new Map();
function numbers(item) {
  if (unpacked.has(item)) return unpacked.get(item);
  const bytes = bytesOf(item.data), view = new DataView(bytes.buffer), values = new Float64Array(bytes.length / 2);
  for (let i = 0; i < values.length; i++) {
    const bits = view.getUint16(2 * i, true), exponent = (bits >> 10) & 31, fraction = bits & 1023;
    const size = exponent === 31 ? NaN : exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024);
    values[i] = item.offset + item.scale * (bits & 0x8000 ? -size : size);
  }
  unpacked.set(item, values);
  return values;
}

// One head of something whose first axis is heads; heads beyond its own show the last one it has.
function ofHead(item, size) {
  const values = numbers(item), heads = Math.max(1, Math.floor(values.length / size));
  const head = Math.min(state.head, heads - 1);
  return values.subarray(head * size, (head + 1) * size);
}

const largest = (values) => { let most = 0; for (const value of values) if (Math.abs(value) > most) most = Math.abs(value); return most; };
const legend = (low, high, shades) => node("span", { class: "scale" }, low, node("i", { style: `background:linear-gradient(90deg,${shades})` }), high);
