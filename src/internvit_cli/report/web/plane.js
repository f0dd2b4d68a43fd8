// The map: a canvas of points that can be dragged and zoomed, and finds the point under the pointer.

const CATEGORIES = ['#3a86d4', '#e69f00', '#12a37d', '#cc79a7', '#d55e00', '#59b8e6', '#8f7ad6', '#a6a100'];
const OTHERS = '#8a939d';
const CELLS = 96;
const REACH = 18;
const MOST_PICTURES = 120;
const PICTURE_SIDE = 44;
const MARGIN = 60;

/** A spatial index of points: those in a cell of a grid are order[start[cell]:start[cell + 1]]. */
class Grid {
  constructor(xs, ys) {
    const cellOf = (point) => Grid.cell(ys[point]) * CELLS + Grid.cell(xs[point]);
    this.start = new Int32Array(CELLS * CELLS + 1);
    for (let point = 0; point < xs.length; point += 1) this.start[cellOf(point) + 1] += 1;
    for (let cell = 0; cell < CELLS * CELLS; cell += 1) this.start[cell + 1] += this.start[cell];
    const next = this.start.slice();
    this.order = new Int32Array(xs.length);
    for (let point = 0; point < xs.length; point += 1) this.order[next[cellOf(point)]++] = point;
    this.xs = xs;
    this.ys = ys;
  }

  static cell(share) {
    return Math.max(0, Math.min(CELLS - 1, Math.floor(share * CELLS)));
  }

  /** Return the point nearest to a place within a distance, or -1. */
  nearest(x, y, reach) {
    let [found, least] = [-1, reach * reach];
    for (let row = Grid.cell(y - reach); row <= Grid.cell(y + reach); row += 1) {
      const from = this.start[row * CELLS + Grid.cell(x - reach)];
      const to = this.start[row * CELLS + Grid.cell(x + reach) + 1];
      for (let place = from; place < to; place += 1) {
        const point = this.order[place];
        const distance = (this.xs[point] - x) ** 2 + (this.ys[point] - y) ** 2;
        if (distance <= least) [found, least] = [point, distance];
      }
    }
    return found;
  }
}

/** The visible part of the plane, with its points. */
class Plane {
  constructor(canvas, xs, ys) {
    this.canvas = canvas;
    this.xs = xs;
    this.ys = ys;
    this.grid = new Grid(xs, ys);
    const span = (values) => Math.max(0.05, values.reduce((most, value) => Math.max(most, 2 * Math.abs(value - 0.5)), 0));
    this.spans = [span(xs), span(ys)];
    this.groups = [];
    this.colors = new Map();
    this.pictures = new Map();
    this.hasPictures = true;
    this.marked = [];
    this.chosen = -1;
    this.hovered = -1;
    this.isAsked = false;
    this.reset();
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => this.draw());
  }

  /** Set the colors of points. */
  color(groups) {
    this.groups = groups;
    this.colors = new Map(groups.flatMap(({ color, points }) => points.map((point) => [point, color])));
    this.draw();
  }

  /** Return the pixels per unit of the plane at which all points are in view. */
  get fit() {
    const [across, down] = this.spans;
    return Math.max(1, Math.min((this.canvas.clientWidth - MARGIN) / across, (this.canvas.clientHeight - MARGIN) / down));
  }

  reset() {
    [this.x, this.y, this.zoom] = [0.5, 0.5, 1];
    this.draw();
  }

  /** Convert a place to pixels, and pixels to a place. */
  toPixels(x, y) {
    const scale = this.fit * this.zoom;
    return [(x - this.x) * scale + this.canvas.clientWidth / 2, (this.y - y) * scale + this.canvas.clientHeight / 2];
  }

  toPlace(left, top) {
    const scale = this.fit * this.zoom;
    return [(left - this.canvas.clientWidth / 2) / scale + this.x, this.y - (top - this.canvas.clientHeight / 2) / scale];
  }

  move(right, down) {
    const scale = this.fit * this.zoom;
    this.x = Math.max(0, Math.min(1, this.x - right / scale));
    this.y = Math.max(0, Math.min(1, this.y + down / scale));
    this.draw();
  }

  /** Zoom by a factor around a pixel. */
  zoomBy(factor, left = this.canvas.clientWidth / 2, top = this.canvas.clientHeight / 2) {
    const [x, y] = this.toPlace(left, top);
    const zoom = Math.max(1, Math.min(2000, this.zoom * factor));
    const kept = this.zoom / zoom;
    this.zoom = zoom;
    [this.x, this.y] = zoom === 1 ? [0.5, 0.5] : [x + (this.x - x) * kept, y + (this.y - y) * kept];
    this.draw();
  }

  center(point) {
    [this.x, this.y, this.zoom] = [this.xs[point], this.ys[point], Math.max(this.zoom, 4)];
    this.draw();
  }

  at(left, top) {
    return this.grid.nearest(...this.toPlace(left, top), REACH / (this.fit * this.zoom));
  }

  /** Draw once before the next frame, however often this is called. */
  draw() {
    if (this.isAsked) return;
    this.isAsked = true;
    requestAnimationFrame(() => {
      this.isAsked = false;
      this.paint();
    });
  }

  paint() {
    const { canvas } = this;
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (canvas.width !== Math.round(width * ratio)) canvas.width = Math.round(width * ratio);
    if (canvas.height !== Math.round(height * ratio)) canvas.height = Math.round(height * ratio);
    const pen = canvas.getContext('2d');
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    const many = this.xs.length > 2000;
    this.radius = Math.min(9, (many ? 2.2 : 4.5) * this.zoom ** 0.25);
    pen.globalAlpha = this.marked.length ? 0.18 : many ? 0.75 : 0.9;
    for (const { color, points } of this.groups) this.dots(pen, points, color, this.radius);
    pen.globalAlpha = 1;
    const style = getComputedStyle(canvas);
    const ink = style.getPropertyValue('--ink');
    this.drawn = new Set();
    if (this.hasPictures) this.drawPictures(pen);
    if (this.marked.length) this.dots(pen, this.marked.filter((point) => !this.drawn.has(point)), style.getPropertyValue('--accent'), this.radius + 1.5);
    for (const point of [this.chosen, this.hovered]) if (point >= 0) this.ring(pen, point, ink);
  }

  dots(pen, points, color, radius) {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const scale = this.fit * this.zoom;
    const isTiny = radius < 3 && points.length > 500;
    pen.fillStyle = color;
    pen.beginPath();
    for (const point of points) {
      const left = (this.xs[point] - this.x) * scale + width / 2;
      const top = (this.y - this.ys[point]) * scale + height / 2;
      if (left < -radius || top < -radius || left > width + radius || top > height + radius) continue;
      if (isTiny) pen.fillRect(left - radius, top - radius, 2 * radius, 2 * radius);
      else {
        pen.moveTo(left + radius, top);
        pen.arc(left, top, radius, 0, 7);
      }
    }
    pen.fill();
  }

  /** Return the points in view if they are few enough for pictures; otherwise none. */
  seen() {
    const [left, bottom] = this.toPlace(0, this.canvas.clientHeight);
    const [right, top] = this.toPlace(this.canvas.clientWidth, 0);
    const found = [];
    for (let point = 0; point < this.xs.length; point += 1) {
      if (this.xs[point] < left || this.xs[point] > right || this.ys[point] < bottom || this.ys[point] > top) continue;
      if (found.push(point) > MOST_PICTURES) return [];
    }
    return found;
  }

  /** Draw thumbnails over their points, framed in their colors; one that would overlap another stays a dot. */
  drawPictures(pen) {
    const marked = new Set(this.marked);
    const taken = [];
    const seen = this.seen();
    const first = (point) => (point === this.chosen ? 0 : marked.has(point) ? 1 : 2);
    for (const point of [...seen].sort((one, other) => first(one) - first(other) || one - other)) {
      const picture = this.picture(point);
      if (!picture) continue;
      const scale = PICTURE_SIDE / Math.max(picture.naturalWidth, picture.naturalHeight);
      const [width, height] = [picture.naturalWidth * scale, picture.naturalHeight * scale];
      const [left, top] = this.toPixels(this.xs[point], this.ys[point]);
      const overlaps = ([x, y, across, down]) => Math.abs(x - left) < (across + width) / 2 + 6 && Math.abs(y - top) < (down + height) / 2 + 6;
      if (taken.some(overlaps)) continue;
      taken.push([left, top, width, height]);
      pen.globalAlpha = marked.size && !marked.has(point) ? 0.18 : 1;
      pen.fillStyle = this.colors.get(point) ?? OTHERS;
      pen.fillRect(left - width / 2 - 2, top - height / 2 - 2, width + 4, height + 4);
      pen.drawImage(picture, left - width / 2, top - height / 2, width, height);
      this.drawn.add(point);
    }
    for (const point of seen.filter((one) => !this.drawn.has(one))) {
      pen.globalAlpha = marked.size && !marked.has(point) ? 0.18 : 1;
      this.dots(pen, [point], this.colors.get(point) ?? OTHERS, this.radius);
      this.outline(pen, point);
    }
    pen.globalAlpha = 1;
  }

  /** Draw a line around a dot, so that it is visible on a thumbnail too. */
  outline(pen, point) {
    const [left, top] = this.toPixels(this.xs[point], this.ys[point]);
    pen.strokeStyle = getComputedStyle(this.canvas).getPropertyValue('--bg');
    pen.lineWidth = 1.5;
    pen.beginPath();
    pen.arc(left, top, this.radius, 0, 7);
    pen.stroke();
  }

  /** Return the thumbnail of a point; nothing if there is none or it is still being decoded. */
  picture(point) {
    const encoded = data.thumbnails.pictures[point];
    if (!encoded) return null;
    if (!this.pictures.has(point)) {
      const picture = new Image();
      picture.onload = () => this.draw();
      picture.src = `data:image/jpeg;base64,${encoded}`;
      this.pictures.set(point, picture);
    }
    const picture = this.pictures.get(point);
    return picture.complete && picture.naturalWidth ? picture : null;
  }

  ring(pen, point, color) {
    const [left, top] = this.toPixels(this.xs[point], this.ys[point]);
    pen.strokeStyle = color;
    pen.lineWidth = 2;
    const [reach, side] = [PICTURE_SIDE / 2 + 4, PICTURE_SIDE + 8];
    pen.beginPath();
    if (this.drawn.has(point)) pen.rect(left - reach, top - reach, side, side);
    else pen.arc(left, top, this.radius + 4, 0, 7);
    pen.stroke();
  }
}

/** Handle the pointer, the wheel, fingers and keys on a plane. */
function steer(plane, onHover, onChoose) {
  const { canvas } = plane;
  const held = new Map();
  let travelled = 0;
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left - canvas.clientLeft, event.clientY - box.top - canvas.clientTop];
  };
  const apart = () => {
    const [one, other] = [...held.values()];
    return Math.hypot(one[0] - other[0], one[1] - other[1]);
  };
  canvas.addEventListener('pointerdown', (event) => {
    held.set(event.pointerId, place(event));
    travelled = 0;
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener('pointermove', (event) => {
    const now = place(event);
    const before = held.get(event.pointerId);
    if (!before) {
      onHover(plane.at(...now), event);
      return;
    }
    const span = held.size === 2 ? apart() : 0;
    held.set(event.pointerId, now);
    travelled += Math.hypot(now[0] - before[0], now[1] - before[1]);
    if (held.size === 2) plane.zoomBy(apart() / Math.max(1, span), ...now);
    else if (travelled > 3) plane.move(now[0] - before[0], now[1] - before[1]);
    canvas.classList.toggle('drags', travelled > 3);
    if (travelled > 3) onHover(-1, event);
  });
  const release = (event) => {
    if (held.delete(event.pointerId) && event.type === 'pointerup' && travelled <= 3) onChoose(plane.at(...place(event)));
    canvas.classList.remove('drags');
  };
  canvas.addEventListener('pointerup', release);
  canvas.addEventListener('pointercancel', release);
  canvas.addEventListener('pointerleave', (event) => onHover(-1, event));
  canvas.addEventListener('wheel', (event) => {
    if (document.activeElement !== canvas && !event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    plane.zoomBy(Math.exp(-Math.max(-200, Math.min(200, event.deltaY)) / 250), ...place(event));
  }, { passive: false });
  const keys = {
    ArrowLeft: () => plane.move(60, 0), ArrowRight: () => plane.move(-60, 0), ArrowUp: () => plane.move(0, 60), ArrowDown: () => plane.move(0, -60),
    '+': () => plane.zoomBy(1.5), '=': () => plane.zoomBy(1.5), '-': () => plane.zoomBy(1 / 1.5), 0: () => plane.reset(),
  };
  canvas.addEventListener('keydown', (event) => {
    if (!keys[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    keys[event.key]();
  });
}
