// Shared by the scripts below: the data, small DOM builders, number formats, the tooltip, colours that follow the theme.
const DATA = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");
const theme = matchMedia("(prefers-color-scheme: dark)");

function node(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "circle", "text", "g", "rect", "clipPath"].includes(tag);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
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

function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = x + 14 + width > innerWidth ? x - width - 14 : x + 14;
  tip.style.left = `${Math.max(6, Math.min(left, innerWidth - width - 6))}px`;
  tip.style.top = `${Math.max(6, Math.min(y + 14, innerHeight - height - 6))}px`;
}

function hideTip() { tip.hidden = true; }

function compact(value) {
  for (const [size, unit] of [[1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (value >= size) return `${+(value / (unit === "k" ? 1e3 : size)).toPrecision(3)}${unit}`;
  }
  return value.toLocaleString("en", { maximumFractionDigits: 0 });
}

function scoreText(value) {
  if (value === null) return "not finite";
  return DATA.metric === "error" ? `${+(100 * value).toPrecision(3)} %` : value.toFixed(3);
}

// A weight or kernel entry in about three digits, with a real minus sign.
function numberText(value) {
  if (value === null || Number.isNaN(value)) return "not finite";
  const size = Math.abs(value);
  const text = size === 0 ? "0" : size >= 0.001 ? value.toFixed(size >= 10 ? 1 : 3) : value.toExponential(1);
  return text.replace("-", "\u2212");
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

// float16 in base64 -> Float32Array.
function halves(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length / 2 }, (_, i) => {
    const bits = view.getUint16(2 * i, true);
    const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
  });
}
