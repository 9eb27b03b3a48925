// Shared by the scripts of every page: its data, small DOM builders, number formats, the tip, colours that follow the theme.
const get = (id) => document.getElementById(id);
const DATA = JSON.parse(get("data").textContent);
const tip = get("tip");
const theme = matchMedia("(prefers-color-scheme: dark)");

const node = (tag, attributes = {}, ...children) => filled(document.createElement(tag), attributes, children);

function filled(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// A labelled <select>; options are [value, text]; `changed` gets the value.
function select(label, options, chosen, changed) {
  const box = node("select", { "aria-label": label }, ...options.map(([value, text]) => node("option", { value }, text)));
  box.value = String(chosen);
  box.addEventListener("change", () => changed(box.value));
  return node("label", {}, label, box);
}

// Text beside a point of the window: on its other side where there is no room, never outside.
function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = x + 14 + width > innerWidth ? x - width - 14 : x + 14;
  const top = y + 18 + height > innerHeight ? y - height - 14 : y + 18;
  tip.style.left = `${Math.max(6, Math.min(left, innerWidth - width - 6))}px`;
  tip.style.top = `${Math.max(6, Math.min(top, innerHeight - height - 6))}px`;
}

function hideTip() { tip.hidden = true; }

const signed = (n) => (n > 0 ? `+${n}` : n < 0 ? `\u2212${-n}` : "0");

// About three digits, with a real minus sign.
function numberText(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "no number";
  const size = Math.abs(value);
  const text = size === 0 ? "0" : size >= 1000 ? value.toPrecision(4) : size >= 0.001 ? String(+value.toPrecision(3)) : value.toExponential(1);
  return text.replace("-", "\u2212");
}

const largest = (values) => { let most = 0; for (const value of values) if (Math.abs(value) > most) most = Math.abs(value); return most; };

// --- packed numbers -----------------------------------------------------------------------------------------------------------

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

// One head of something packed whose first axis is heads of `size` numbers; heads beyond its own show the last one it has.
function ofHead(item, size, head) {
  const values = numbers(item), heads = Math.max(1, Math.floor(values.length / size)), at = Math.min(head, heads - 1);
  return values.subarray(at * size, (at + 1) * size);
}

// --- colours ------------------------------------------------------------------------------------------------------------------

const SHADES = { diverging: "var(--low),var(--zero),var(--high)", sequential: "var(--zero),var(--warm)" };

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

const legend = (low, high, kind) => node("span", { class: "scale" }, low, node("i", { style: `background:linear-gradient(90deg,${SHADES[kind]})` }), high);

// The colour behind a piece of text for a share of the strongest; "" where there is next to none. `most`: how much of it a share of 1 shows.
function wash(share, kind, most) {
  if (!(Math.abs(share) > 0.01)) return "";
  const name = kind === "sequential" ? "--warm" : share < 0 ? "--low" : "--high";
  return `color-mix(in srgb, var(${name}) calc(${most} * ${Math.min(1, Math.abs(share)).toFixed(3)}), transparent)`;
}
