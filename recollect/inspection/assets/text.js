// The text as a coloured strip, the chart of the same numbers along the text, and what a token's read draws from.
const BLOCK = 256; // tokens that are built and coloured together
const strip = get("strip"), chart = get("chart");
const spans = new Array(LENGTH);
const visible = new Set(); // blocks in sight: others are coloured when they come
let paint = () => "";

const stripOf = () => layer().strips.find((one) => one.key === state.quantity);
const hasReads = () => layer().reads !== null;

// The token whose read is stored that is nearest to the one asked for: not every read is, of a memory.
function nearestRead(token) {
  const reads = layer().reads;
  if (!reads || reads.kind !== "some") return token;
  return reads.queries.reduce((a, b) => (Math.abs(b - token) < Math.abs(a - token) ? b : a));
}

// What token `reader` reads from every token: [T], NaN where this page does not hold it.
function readOf(reader) {
  const reads = layer().reads, found = new Float32Array(LENGTH).fill(NaN);
  if (reads.kind === "map") {
    const maps = layer().maps, map = maps[maps.length - 1], row = (reader * (reader + 1)) / 2;
    found.set(ofHead(map, (map.side * (map.side + 1)) / 2, state.head).subarray(row, row + reader + 1));
  } else if (reads.kind === "some") {
    const n = reads.queries.length, at = reads.queries.indexOf(reader);
    found.set(ofHead(reads, n * LENGTH, state.head).subarray(at * LENGTH, at * LENGTH + reader + 1));
  } else {
    reads.index ??= new Int32Array(bytesOf(reads.keys).buffer);
    const top = reads.top, heads = reads.index.length / (LENGTH * top), head = Math.min(state.head, heads - 1);
    const weights = ofHead(reads, LENGTH * top, state.head);
    for (let i = 0; i < top; i++) {
      const key = reads.index[(head * LENGTH + reader) * top + i];
      if (key >= 0) found[key] = weights[reader * top + i];
    }
  }
  return found;
}

// What is drawn now: values [T], their range, and whether they have a sign. The upper end leaves one outlier in a hundred out.
function shown() {
  if (state.quantity === "reads") {
    const values = readOf(state.reader), most = largest(values) || 1;
    return { values, low: values.some((value) => value < 0) ? -most : 0, high: most, signed: values.some((value) => value < 0) };
  }
  const one = stripOf(), values = one ? ofHead(one, LENGTH, state.head) : new Float32Array(LENGTH).fill(NaN);
  const sorted = values.filter((value) => !Number.isNaN(value)).sort();
  if (!sorted.length) return { values, low: 0, high: 1, signed: false };
  const high = sorted[Math.min(sorted.length - 1, Math.floor(0.99 * sorted.length))];
  return { values, low: sorted[0], high: high > sorted[0] ? high : sorted[sorted.length - 1], signed: false };
}

// All numbers of a token in the chosen layer and head.
function tellToken(token) {
  const lines = [tokenName(token)];
  if (state.quantity === "reads") {
    const value = readOf(state.reader)[token];
    const what = token > state.reader ? "later than the read" : Number.isNaN(value) ? "not among the strongest" : nearOne(value);
    lines.push(`read of token ${state.reader.toLocaleString("en")}: ${what}`);
  }
  for (const one of layer().strips) {
    const value = ofHead(one, LENGTH, state.head)[token];
    const when = one.measured === null ? "" : one.measured.filter((end) => end <= token).pop();
    lines.push(`${one.title}: ${nearOne(value)}${when === "" || when === undefined || when === token ? "" : ` (after token ${when})`}`);
  }
  return lines.join("\n");
}

function moveTo(token, x, y) {
  if (state.token !== null) spans[state.token]?.classList.remove("here");
  state.token = token;
  drawChart();
  if (token === null) return hideTip();
  spans[token].classList.add("here");
  showTip(tellToken(token), x, y);
}

// Follow where a token reads from.
function follow(token) {
  if (!hasReads()) return;
  state.reader = nearestRead(token);
  state.quantity = "reads";
  renderText();
}

function colourBlock(block) {
  for (let i = block * BLOCK; i < Math.min(LENGTH, (block + 1) * BLOCK); i++) {
    spans[i].style.backgroundColor = paint(i);
    spans[i].classList.toggle("reader", state.quantity === "reads" && i === state.reader);
    spans[i].classList.toggle("later", state.quantity === "reads" && i > state.reader);
  }
}

function renderText() {
  const controls = get("text-controls"), now = layer();
  const choices = [...now.strips.map((one) => [one.key, one.title]), ...(hasReads() ? [["reads", "Where a token reads from"]] : [])];
  if (!choices.some(([key]) => key === state.quantity)) state.quantity = choices.length ? choices[0][0] : null;
  if (hasReads()) state.reader = nearestRead(state.reader);
  const { values, low, high, signed: hasSign } = shown();
  controls.replaceChildren(select("quantity", choices, state.quantity, (value) => { state.quantity = value; renderText(); showReader(); get("text-controls").querySelector("select").focus(); }));
  if (state.quantity === "reads") controls.append(readerSlider());
  controls.append(legend(nearOne(low), hasSign || state.quantity === "reads" ? nearOne(high) : `\u2265 ${nearOne(high)}`,
    hasSign ? "diverging" : "sequential"));
  const one = stripOf();
  get("what").textContent = state.quantity === "reads" ? now.reads.what
    : one ? one.what + (one.measured === null ? "" : ` Measured after ${one.measured.length.toLocaleString("en")} of the tokens; the others show the last measurement before them.`) : "";
  get("missing").replaceChildren(...now.missing.map((text) => node("li", {}, text)));
  paint = (i) => (hasSign ? wash(values[i] / high, "diverging", "var(--most)") : wash((values[i] - low) / (high - low || 1), "sequential", "var(--most)"));
  for (const block of visible) colourBlock(block);
  drawChart();
  markReader();
}

// Scroll the text, not the page, to the token whose read is followed.
function showReader() {
  if (state.quantity !== "reads") return;
  const at = spans[state.reader].offsetTop, room = strip.clientHeight;
  if (at < strip.scrollTop || at > strip.scrollTop + room - 30) strip.scrollTop = at - 0.75 * room;
}

function readerSlider() {
  const reads = layer().reads, some = reads.kind === "some" ? reads.queries : null;
  const slider = node("input", { type: "range", min: 0, max: some ? some.length - 1 : LENGTH - 1, value: some ? some.indexOf(state.reader) : state.reader });
  const name = node("output", {}, tokenName(state.reader));
  slider.addEventListener("input", () => {
    state.reader = some ? some[Number(slider.value)] : Number(slider.value);
    name.textContent = tokenName(state.reader);
    renderText();
    showReader();
    get("text-controls").querySelector("input").focus();
  });
  return node("label", {}, some ? `read of (one of ${some.length})` : "read of", slider, name);
}

// --- the chart --------------------------------------------------------------------------------------------------------------

const PLOT = { left: 52, right: 8, top: 8, bottom: 20 };
const xOf = (token, width) => PLOT.left + ((token + 0.5) / LENGTH) * (width - PLOT.left - PLOT.right);

let asked = false;
function drawChart() {
  if (asked) return; // at most once per frame, however fast the pointer is
  asked = true;
  requestAnimationFrame(() => { asked = false; drawChartNow(); });
}

function drawChartNow() {
  const width = chart.clientWidth, height = chart.clientHeight, ratio = devicePixelRatio || 1;
  if (!width) return;
  chart.width = Math.round(width * ratio);
  chart.height = Math.round(height * ratio);
  const context = chart.getContext("2d"), css = getComputedStyle(document.documentElement), color = (name) => css.getPropertyValue(name).trim();
  context.scale(ratio, ratio);
  const { values, low, signed: hasSign } = shown();
  const most = values.reduce((best, value) => (value > best ? value : best), -Infinity);
  const top = most > -Infinity ? most : 1, bottom = hasSign ? -largest(values) : Math.min(low, state.quantity === "reads" ? 0 : low);
  const y = (value) => height - PLOT.bottom - ((value - bottom) / (top - bottom || 1)) * (height - PLOT.top - PLOT.bottom);
  context.font = "11px system-ui, sans-serif";
  context.fillStyle = color("--soft");
  context.strokeStyle = color("--line");
  context.textAlign = "right";
  for (const value of top === bottom ? [top] : [bottom, (top + bottom) / 2, top]) {
    context.fillText(nearOne(value), PLOT.left - 6, y(value) + 4);
    context.beginPath(); context.moveTo(PLOT.left, y(value)); context.lineTo(width - PLOT.right, y(value)); context.stroke();
  }
  context.textAlign = "center";
  for (const share of width < 500 ? [0, 0.5, 1] : [0, 0.25, 0.5, 0.75, 1]) {
    const token = Math.round(share * (LENGTH - 1));
    context.textAlign = share === 1 ? "right" : "center";
    context.fillText(token.toLocaleString("en"), xOf(token, width), height - 5);
  }
  context.strokeStyle = color("--accent");
  context.lineWidth = 1.3;
  if (state.quantity === "reads") bars(context, values, width, y);
  else line(context, values, width, y);
  if (state.token !== null) {
    context.strokeStyle = color("--ink");
    context.lineWidth = 1;
    context.beginPath(); context.moveTo(xOf(state.token, width), PLOT.top); context.lineTo(xOf(state.token, width), height - PLOT.bottom); context.stroke();
  }
}

function line(context, values, width, y) {
  context.beginPath();
  let open = false;
  for (let i = 0; i < LENGTH; i++) {
    if (Number.isNaN(values[i])) { open = false; continue; }
    if (open) context.lineTo(xOf(i, width), y(values[i])); else context.moveTo(xOf(i, width), y(values[i]));
    open = true;
  }
  context.stroke();
}

function bars(context, values, width, y) {
  context.beginPath();
  for (let i = 0; i < LENGTH; i++) {
    if (Number.isNaN(values[i])) continue;
    context.moveTo(xOf(i, width), y(0));
    context.lineTo(xOf(i, width), y(values[i]));
  }
  context.stroke();
}

// --- building and listening -------------------------------------------------------------------------------------------------

function buildText(done) {
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const block = Number(entry.target.dataset.block);
      if (entry.isIntersecting) { visible.add(block); colourBlock(block); } else visible.delete(block);
    }
  }, { root: strip, rootMargin: "200px" });
  let next = 0;
  function build() {
    const until = Math.min(next + 4 * BLOCK, LENGTH);
    for (; next < until; next += BLOCK) {
      const group = node("span", { "data-block": next / BLOCK });
      for (let i = next; i < Math.min(next + BLOCK, LENGTH); i++) {
        spans[i] = node("span", { class: DATA.tokens[i] === "" ? "t soft" : "t" }, tokenText(i));
        spans[i].token = i;
        group.append(spans[i]);
      }
      strip.append(group);
      watcher.observe(group);
    }
    if (next < LENGTH) requestAnimationFrame(build); else done();
  }
  build();
}

function keyMove(event, place) {
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -32, ArrowDown: 32, PageUp: -256, PageDown: 256, Home: -LENGTH, End: LENGTH }[event.key];
  if (event.key === "Escape") return moveTo(null);
  if (event.key === "Enter" && state.token !== null) { event.preventDefault(); follow(state.token); return place(state.token); }
  if (step === undefined) return;
  event.preventDefault();
  const token = Math.max(0, Math.min(LENGTH - 1, (state.token ?? (step > 0 ? -1 : LENGTH)) + step));
  place(token);
}

strip.addEventListener("pointermove", (event) => {
  const token = event.target.token;
  if (token !== undefined) moveTo(token, event.clientX, event.clientY);
});
strip.addEventListener("pointerleave", () => moveTo(null));
strip.addEventListener("blur", () => moveTo(null));
strip.addEventListener("click", (event) => { if (event.target.token !== undefined) follow(event.target.token); });
strip.addEventListener("keydown", (event) => keyMove(event, (token) => {
  spans[token].scrollIntoView({ block: "nearest" });
  const frame = spans[token].getBoundingClientRect();
  moveTo(token, frame.right, frame.bottom);
}));

function chartToken(event) {
  const frame = chart.getBoundingClientRect(), share = (event.clientX - frame.left - PLOT.left) / (frame.width - PLOT.left - PLOT.right);
  return Math.max(0, Math.min(LENGTH - 1, Math.floor(share * LENGTH)));
}
chart.addEventListener("pointermove", (event) => moveTo(chartToken(event), event.clientX, event.clientY));
chart.addEventListener("pointerleave", () => moveTo(null));
chart.addEventListener("blur", () => moveTo(null));
chart.addEventListener("click", (event) => { const token = chartToken(event); follow(token); spans[token].scrollIntoView({ block: "nearest" }); });
chart.addEventListener("keydown", (event) => keyMove(event, (token) => {
  const frame = chart.getBoundingClientRect();
  moveTo(token, frame.left + xOf(token, frame.width), frame.top + 20);
}));
theme.addEventListener("change", drawChart);
addEventListener("resize", drawChart);
