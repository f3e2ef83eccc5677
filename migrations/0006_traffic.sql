CREATE TABLE `traffic_samples` (
	`id` integer PRIMARY KEY AUTOINCREMENT NOT NULL,
	`tenant` text NOT NULL,
	`version` text NOT NULL,
	`cluster` integer NOT NULL,
	`distances` text NOT NULL,
	`created_at_ms` integer NOT NULL
);
--> statement-breakpoint
CREATE INDEX `traffic_samples_tenant` ON `traffic_samples` (`tenant`,`id`);--> statement-breakpoint
CREATE INDEX `traffic_samples_version` ON `traffic_samples` (`version`,`id`);