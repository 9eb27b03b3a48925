// Learning curves: an SVG that is drawn anew for every width, axis choice and legend toggle.
const AXES = { 0: "training steps", 1: "tokens seen", 2: "training time, seconds" };

const shape = (tag, attributes = {}, ...children) => filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

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

function drawCurves(root) {
  const mixers = DATA.mixers.map((mixer, i) => ({ ...mixer, color: `var(--s${i % 7})` }));
  const state = { x: 0, y: 3, hidden: new Set(), at: null };
  if (!mixers.some((mixer) => mixer.runs.length)) {
    root.append(node("p", { class: "note" }, "No evaluation has been stored yet."));
    return;
  }
  const scoreName = DATA.metric === "error" ? "error" : "bits per byte";
  const toggles = node("div", { class: "legend", role: "group", "aria-label": "Mixers shown" });
  for (const mixer of mixers) {
    const line = shape("line", { x1: 1, x2: 25, y1: 4, y2: 4, style: `stroke:${mixer.color};stroke-width:3` });
    const toggle = node("button", { type: "button", "aria-pressed": "true" }, shape("svg", { "aria-hidden": "true" }, line), mixer.label);
    toggle.addEventListener("click", () => {
      if (!state.hidden.delete(mixer.label)) state.hidden.add(mixer.label);
      toggle.setAttribute("aria-pressed", String(!state.hidden.has(mixer.label)));
      render();
    });
    toggles.append(toggle);
  }
  const choose = (key) => (value) => { state[key] = Number(value); state.at = null; render(); };
  const horizontal = select("across", Object.entries(AXES), 0, choose("x"));
  const vertical = select("up", [[3, scoreName], [4, "loss (nats per token)"]], 3, choose("y"));
  const label = `Learning curves: ${scoreName} of ${mixers.map((mixer) => mixer.label).join(", ")}. Arrow keys read values.`;
  const svg = shape("svg", { class: "plot", tabindex: 0, role: "img", "aria-label": label });
  root.append(node("div", { class: "controls" }, toggles, horizontal, vertical), svg);

  const shown = () => mixers.filter((mixer) => !state.hidden.has(mixer.label) && mixer.runs.length);
  const usable = (points) => points.filter((point) => point[state.x] !== null && point[state.y] !== null);
  let view = null;

  function scales(width, height) {
    const points = shown().flatMap((mixer) => mixer.runs.flatMap((run) => usable(run.points)));
    if (!points.length) return null;
    const wide = width > 620;
    const named = Math.max(...shown().map((mixer) => mixer.label.length));
    const box = { left: 56, right: width - (wide ? Math.min(28 + 7.5 * named, 190) : 24), top: 16, bottom: height - 42 };
    // Bits per byte: the axis begins where the curves are after a fifth of the steps; the fall before would flatten the rest.
    const last = Math.max(...points.map((point) => point[0]));
    const later = DATA.metric === "error" ? points : points.filter((point) => point[0] >= 0.2 * last);
    const values = later.map((point) => point[state.y]);
    const error = DATA.metric === "error" && state.y === 3;
    const floor = error ? DATA.floor : Math.min(...values.filter((value) => value > 0));
    const log = error || (state.y === 4 && floor > 0 && Math.max(...values) / floor > 20);
    const place = log ? (value) => Math.log10(Math.max(value, floor)) : (value) => value;
    let [low, high] = [Math.min(...values.map(place)), Math.max(...values.map(place))];
    if (error) [low, high] = [Math.min(low, -2), 0];
    else if (DATA.chance !== null && state.y === 3) high = Math.max(high, DATA.chance);
    const pad = (high - low || 1) * 0.05;
    [low, high] = [low - (error ? 0 : pad), high + pad];
    const right = Math.max(...points.map((point) => point[state.x])) || 1;
    return {
      box, log, error, floor, low, high, right, wide,
      x: (value) => box.left + (value / right) * (box.right - box.left),
      y: (value) => box.bottom - ((place(value) - low) / (high - low)) * (box.bottom - box.top),
    };
  }

  function yTicks({ log, low, high, error, floor }) {
    if (!log) return roundTicks(low, high, 5);
    const all = [];
    for (let power = Math.floor(low); power <= high; power++) all.push(...[1, 2, 5].map((m) => m * 10 ** power));
    const inside = all.filter((value) => Math.log10(value) >= low - 1e-9 && Math.log10(value) <= high);
    const kept = inside.length > 10 ? inside.filter((value) => String(value.toExponential(0))[0] === "1") : inside;
    const zero = error && Math.log10(floor) >= low - 1e-9;
    return zero ? [floor, ...kept.filter((value) => value > floor * 1.6)] : kept;
  }

  function tickText(value) {
    if (state.y === 3 && view.error) return value === view.floor ? "0 %" : `${+(100 * value).toPrecision(2)} %`;
    return String(+value.toPrecision(3));
  }

  // A line through the points; a single one becomes a dot (a line of no length with round caps).
  function path(points) {
    const places = usable(points).map((point) => `${view.x(point[state.x]).toFixed(1)} ${view.y(point[state.y]).toFixed(1)}`);
    return places.length ? `M${places.join("L")}${places.length > 1 ? "" : "h0"}` : "";
  }

  function render() {
    const width = Math.max(root.clientWidth, 240), height = Math.round(Math.min(440, Math.max(270, width * 0.5)));
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("height", height);
    svg.replaceChildren();
    view = scales(width, height);
    if (!view) return;
    const { box } = view;
    for (const value of yTicks(view)) {
      const y = view.y(value);
      svg.append(shape("line", { class: "grid", x1: box.left, x2: box.right, y1: y, y2: y }));
      svg.append(shape("text", { x: box.left - 8, y: y + 4, "text-anchor": "end" }, tickText(value)));
    }
    for (const value of roundTicks(0, view.right, width > 620 ? 6 : 4)) {
      svg.append(shape("text", { x: view.x(value), y: box.bottom + 18, "text-anchor": "middle" }, compact(value)));
    }
    svg.append(shape("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
    svg.append(shape("text", { x: (box.left + box.right) / 2, y: height - 8, "text-anchor": "middle" }, AXES[state.x]));
    if (state.y === 3 && DATA.chance !== null) {
      const y = view.y(DATA.chance);
      svg.append(shape("line", { class: "chance", x1: box.left, x2: box.right, y1: y, y2: y }));
      svg.append(shape("text", { x: box.left + 6, y: y + 14 }, "chance"));
    }
    const size = { x: box.left, y: box.top - 8, width: box.right - box.left + 4, height: box.bottom - box.top + 10 };
    svg.append(shape("clipPath", { id: "inside" }, shape("rect", size)));
    const lines = shape("g", { "clip-path": "url(#inside)" });
    for (const mixer of shown()) {
      for (const run of mixer.runs) lines.append(shape("path", { class: "seed", d: path(run.points), style: `stroke:${mixer.color}` }));
    }
    for (const mixer of shown()) lines.append(shape("path", { class: "mean", d: path(mixer.mean), style: `stroke:${mixer.color}` }));
    svg.append(lines);
    if (view.wide) endLabels();
    svg.append(shape("g", { class: "cursor" }));
  }

  // Names beside the ends of the mean lines, where there is room; on a phone the legend must do.
  function endLabels() {
    const ends = shown().filter((mixer) => usable(mixer.mean).length)
      .map((mixer) => ({ mixer, y: view.y(usable(mixer.mean).at(-1)[state.y]) })).sort((a, b) => a.y - b.y);
    const places = apart(ends.map((end) => end.y), 15);
    ends.forEach(({ mixer }, i) => {
      const y = Math.min(places[i], view.box.bottom) + 4;
      svg.append(shape("text", { class: "end", x: view.box.right + 10, y, style: `fill:${mixer.color}` }, mixer.label));
    });
  }

  function nearest(points, x) {
    return points.reduce((best, point) => (Math.abs(point[state.x] - x) < Math.abs(best[state.x] - x) ? point : best));
  }

  // Read all curves at data position x; the tip stands beside them at client height cy.
  function read(x, cy) {
    const cursor = svg.querySelector(".cursor");
    const curves = shown().filter((mixer) => usable(mixer.mean).length).map((mixer) => ({ mixer, point: nearest(usable(mixer.mean), x) }));
    if (!cursor || !curves.length) return;
    const anchor = nearest(curves.map((curve) => curve.point), x)[state.x];
    const px = view.x(anchor);
    cursor.replaceChildren(shape("line", { class: "axis", x1: px, x2: px, y1: view.box.top, y2: view.box.bottom }));
    const unit = { 0: "step ", 1: "tokens ", 2: "seconds " }[state.x];
    const lines = [`${unit}${compact(anchor)}`];
    for (const { mixer, point } of curves.sort((a, b) => b.point[state.y] - a.point[state.y])) {
      const y = view.y(point[state.y]);
      if (y >= view.box.top) cursor.append(shape("circle", { class: "dot", cx: view.x(point[state.x]), cy: y, r: 4.5, style: `fill:${mixer.color}` }));
      const seeds = mixer.runs.map((run) => run.points.find((other) => other[0] === point[0])).filter(Boolean);
      const values = seeds.map((other) => show(other[state.y]).replace(" %", "")).join(", ");
      lines.push(`${mixer.label}: ${show(point[state.y])}${seeds.length > 1 ? ` (seeds ${values})` : ""}`);
    }
    state.at = anchor;
    const frame = svg.getBoundingClientRect();
    showTip(lines.join("\n"), frame.left + px, view.wide ? cy : frame.bottom - 10);  // on a phone below the curves, not over them
  }

  const show = (value) => (state.y === 3 ? scoreText(value) : value === null ? "not finite" : String(+value.toPrecision(3)));
  const clear = () => { svg.querySelector(".cursor")?.replaceChildren(); hideTip(); };

  svg.addEventListener("pointermove", (event) => {
    if (!view) return;
    const frame = svg.getBoundingClientRect();
    const x = ((event.clientX - frame.left - view.box.left) / (view.box.right - view.box.left)) * view.right;
    read(x, event.clientY);
  });
  svg.addEventListener("pointerleave", clear);
  svg.addEventListener("blur", clear);
  svg.addEventListener("keydown", (event) => {
    const stops = [...new Set(shown().flatMap((mixer) => usable(mixer.mean).map((point) => point[state.x])))].sort((a, b) => a - b);
    if (event.key === "Escape") clear();
    const now = state.at === null ? -1 : stops.findIndex((stop) => stop >= state.at);
    const next = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: stops.length - 1 }[event.key];
    if (next === undefined || !stops.length) return;
    event.preventDefault();
    const stop = stops[Math.max(0, Math.min(next, stops.length - 1))];
    read(stop, svg.getBoundingClientRect().top + 40);
  });
  new ResizeObserver(render).observe(root);
  render();
}

function roundTicks(low, high, wanted) {
  const raw = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(raw || 1));
  const step = power * ([1, 2, 5, 10].find((m) => m * power >= raw) || 10);
  const places = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-6; value += step) places.push(+value.toPrecision(10));
  return places;
}

// The places nearest to ascending `heights` (least squares) that keep `gap` between neighbours.
function apart(heights, gap) {
  const groups = [];
  for (const height of heights) {
    groups.push({ total: height, size: 1 });
    for (let [a, b] = groups.slice(-2); b && a.total / a.size + gap * a.size > b.total / b.size; [a, b] = groups.slice(-2)) {
      groups.pop();
      a.total += b.total - gap * a.size * b.size;
      a.size += b.size;
    }
  }
  return groups.flatMap(({ total, size }) => Array.from({ length: size }, (_, i) => total / size + gap * i));
}

drawCurves(get("plot"));
